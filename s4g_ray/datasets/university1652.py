"""Convert University-1652: drone, satellite, street and web-search (google) images of buildings.

A place is a university building. The folders hold no positions. Buildings of the test galleries
without a query are distractors. Web-search images exist for training only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.published.archive_root import open_root
from s4g_ray.datasets.published.drone_folders import find_images, list_places
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.datasets.source_rows import Row
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

VIEW_NAMES = {
    "drone": "drone image",
    "satellite": "satellite image",
    "street": "street photo",
    "google": "web-search photo",
}
TRAIN_ONLY = "google"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")  # upper case counts too


def convert(
    source: str,
    target: str,
    *,
    query_view: str = "drone",
    reference_view: str = "satellite",
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a University-1652 folder; images stay where they are.

    Each view is one of drone, satellite, street and google, or several joined by commas
    ("street,google"); region is then the view of each image. References of buildings without a test
    query have the split `gallery`. `strict` has no effect: no list names images that could be
    missing. Raises InputError for views that do not exist or are on both sides, another layout,
    building folders that are not numbers, and a target that holds a data set.
    """
    query_views = _parse_views("--query-view", query_view)
    reference_views = _parse_views("--reference-view", reference_view)
    shared = set(query_views).intersection(reference_views)
    if shared:
        raise InputError(
            f"{', '.join(sorted(shared))} is in --query-view and in --reference-view; choose one"
            " side"
        )
    target = files.absolute(target)
    refuse_existing(target)
    folders = _list_folders(query_views, "query") + _list_folders(reference_views, "gallery")
    layouts = {"University-1652": [folder.path for folder in folders]}
    source_folder, _ = open_root(source, layouts, report)
    images = list(_find_images(source_folder, folders))
    references = _make_references(source_folder, images, with_region=len(reference_views) > 1)
    queries = _make_queries(source_folder, images, with_region=len(query_views) > 1)
    name = f"university1652_{'+'.join(query_views)}_to_{'+'.join(reference_views)}"
    view_names = {
        "references": " or ".join(VIEW_NAMES[view] for view in reference_views),
        "queries": " or ".join(VIEW_NAMES[view] for view in query_views),
    }
    return source_folder.write(
        target, references, queries, name=name, views=view_names, strict=strict
    )


def _parse_views(option: str, text: str) -> list[str]:
    """Return the views that an option names. Raises InputError when none has test images."""
    views = list(dict.fromkeys(view.strip() for view in text.split(",")))
    for view in views:
        if view not in VIEW_NAMES:
            raise InputError(f"{option} {text!r}: {view!r} is none of {', '.join(VIEW_NAMES)}")
    if views == [TRAIN_ONLY]:
        raise InputError(
            f"{option} {text!r} has no test images; join it with another view, such as"
            " street,google"
        )
    return views


@dataclass(frozen=True)
class _Folder:
    path: str
    view: str
    side: str  # query or gallery
    split: str


@dataclass(frozen=True)
class _Image:
    folder: _Folder
    building: int
    path: str


def _make_references(
    source_folder: SourceFolder, images: Sequence[_Image], *, with_region: bool
) -> list[Row]:
    """Return the reference rows; distractors have the split `gallery`."""
    tested = {
        image.building
        for image in images
        if image.folder.side == "query" and image.folder.split == "test"
    }
    rows: list[Row] = []
    for image in images:
        if image.folder.side != "gallery":
            continue
        split = image.folder.split
        if split == "test" and image.building not in tested:
            split = "gallery"
        rows.append(_make_row(source_folder, image, len(rows), split, with_region))
    return rows


def _make_queries(
    source_folder: SourceFolder, images: Sequence[_Image], *, with_region: bool
) -> list[Row]:
    rows: list[Row] = []
    for image in images:
        if image.folder.side == "query":
            split = image.folder.split
            rows.append(_make_row(source_folder, image, len(rows), split, with_region))
    return rows


def _make_row(
    source_folder: SourceFolder, image: _Image, number: int, split: str, with_region: bool
) -> Row:
    return Row(
        id=number,
        place_id=image.building,
        uri=source_folder.join(image.path),
        split=split,
        region=image.folder.view if with_region else None,
        source_id=image.path,
    )


def _list_folders(views: Sequence[str], side: str) -> list[_Folder]:
    tested = [view for view in views if view != TRAIN_ONLY]
    train = [_Folder(f"train/{view}", view, side, "train") for view in views]
    return train + [_Folder(f"test/{side}_{view}", view, side, "test") for view in tested]


def _find_images(source_folder: SourceFolder, folders: Sequence[_Folder]) -> Iterator[_Image]:
    """Yield all images, folder by folder, by building and name. Notes how many files are others."""
    buildings = [
        (folder, name)
        for folder in folders
        for name in list_places(source_folder, folder.path, "building")
    ]
    paths = [f"{folder.path}/{name}" for folder, name in buildings]
    found = find_images(source_folder, paths, EXTENSIONS)
    for (folder, building), images in zip(buildings, found, strict=True):
        for path in images:
            yield _Image(folder, int(building), path)
