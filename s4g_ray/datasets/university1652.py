"""University-1652: drone, satellite, street and web-search (google) images of university buildings.

A place is a building. The folders carry no positions; buildings of the test galleries without a query are
distractors. Web-search images exist for training alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.source import Report, Row, SourceFolder, is_number, silent, some
from s4g_ray.errors import InputError
from s4g_ray.storage import files

VIEW_NAMES = {
    "drone": "drone image",
    "satellite": "satellite image",
    "street": "street photo",
    "google": "web-search photo",
}
TRAIN_ONLY = "google"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")  # in any case


def convert(
    source: str,
    target: str,
    *,
    query_view: str = "drone",
    reference_view: str = "satellite",
    strict: bool = False,
    report: Report = silent,
) -> GeoDataset:
    """Convert a University-1652 folder, images referenced where they are.

    Each view is one of drone, satellite, street and google, or several joined by commas ("street,google");
    region is then the view of each image. References of buildings without a test query have the split
    `gallery`. `strict` has nothing to refuse: what is listed is there. Raises InputError for views that do not
    exist or are on both sides, another layout, building folders that are not numbers, and a target that holds
    a data set.
    """
    query_views, reference_views = (
        _views("query_view", query_view),
        _views("reference_view", reference_view),
    )
    shared = set(query_views).intersection(reference_views)
    if shared:
        raise InputError(
            f"{', '.join(sorted(shared))} is in query_view and in reference_view; choose one side"
        )
    target = files.absolute(target)
    refuse_existing(target)
    source_folder = SourceFolder(source, report)
    folders = _folders(query_views, "query") + _folders(reference_views, "gallery")
    source_folder.choose({"University-1652": [folder.path for folder in folders]})
    images = list(_images(source_folder, folders))
    tested = {
        image.building
        for image in images
        if image.folder.side == "query" and image.folder.split == "test"
    }
    references, queries = list[Row](), list[Row]()
    for image in images:
        rows, several = (
            (queries, len(query_views) > 1)
            if image.folder.side == "query"
            else (references, len(reference_views) > 1)
        )
        distractor = (
            image.folder.side == "gallery"
            and image.folder.split == "test"
            and image.building not in tested
        )
        rows.append(
            Row(
                id=len(rows),
                place_id=image.building,
                uri=source_folder.join(image.path),
                split="gallery" if distractor else image.folder.split,
                region=image.folder.view if several else None,
                source_id=image.path,
            )
        )
    name = f"university1652_{'+'.join(query_views)}_to_{'+'.join(reference_views)}"
    words = {
        "references": " or ".join(VIEW_NAMES[view] for view in reference_views),
        "queries": " or ".join(VIEW_NAMES[view] for view in query_views),
    }
    return source_folder.write(target, references, queries, name=name, views=words, strict=strict)


def _views(option: str, text: str) -> list[str]:
    """The views of an option; at least one of them has test images."""
    views = list(dict.fromkeys(view.strip() for view in text.split(",")))
    for view in views:
        if view not in VIEW_NAMES:
            raise InputError(f"{option}={text!r}: {view!r} is none of {', '.join(VIEW_NAMES)}")
    if views == [TRAIN_ONLY]:
        raise InputError(
            f"{option}={text!r} has no test images; join it with another view, such as street,google"
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


def _folders(views: Sequence[str], side: str) -> list[_Folder]:
    train = [_Folder(f"train/{view}", view, side, "train") for view in views]
    return train + [
        _Folder(f"test/{side}_{view}", view, side, "test") for view in views if view != TRAIN_ONLY
    ]


def _images(source_folder: SourceFolder, folders: Sequence[_Folder]) -> Iterator[_Image]:
    """All images, folder by folder, by building and name; other files are counted."""
    buildings = [
        (folder, name) for folder in folders for name in _buildings(source_folder, folder.path)
    ]
    source_folder.prefetch(f"{folder.path}/{name}" for folder, name in buildings)
    others = []
    for folder, building in buildings:
        inside = f"{folder.path}/{building}"
        for name in sorted(source_folder.names(inside)):
            if name.startswith("."):  # of a file manager or an archive tool
                continue
            if PurePosixPath(name).suffix.lower() in EXTENSIONS:
                yield _Image(folder, int(building), f"{inside}/{name}")
            else:
                others.append(f"{inside}/{name}")
    if others:
        source_folder.note(
            f"files left out that are not {', '.join(EXTENSIONS)}: {len(others):,}: {some(others)}"
        )


def _buildings(source_folder: SourceFolder, folder: str) -> list[str]:
    names = sorted(name for name in source_folder.names(folder) if not name.startswith("."))
    stray = [name for name in names if "." in name]  # a file, such as Thumbs.db
    if stray:
        source_folder.note(
            f"files of {folder} left out, as they are no building's folder: {some(stray)}"
        )
    names = [name for name in names if name not in stray]
    for name in names:
        if not is_number(name):
            raise InputError(
                f"{source_folder.join(folder)} holds {name!r}, which is no building's number; remove it"
            )
    return sorted(names, key=int)
