"""Read numbered folders of images, a place each, as University-1652 introduced them.

Also make rows of the images, and rows of tiles that have sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from s4g_ray.amounts import join_first
from s4g_ray.arrays import Bools, Floats64
from s4g_ray.data.schema import OPTIONAL, SCHEMAS
from s4g_ray.datasets.source import SourceFolder, is_number
from s4g_ray.datasets.source_rows import Row, ViewRows
from s4g_ray.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")  # upper case counts too

VIEWS = {"drone": "drone image", "satellite": "satellite image"}


@dataclass(frozen=True)
class PlaceImage:
    """An image of a place. region: what its queries are scored by; lat and lon in degrees."""

    place_id: int
    path: str  # in the source
    split: str
    region: str | None = None
    lat: float | None = None
    lon: float | None = None


def check_views(query_view: str, reference_view: str) -> None:
    """Raise InputError unless one of the views is drone and the other satellite."""
    if {query_view, reference_view} != set(VIEWS):
        raise InputError(
            f"--query-view {query_view!r}, --reference-view {reference_view!r}: one must be drone,"
            " the other satellite"
        )


def list_places(source_folder: SourceFolder, folder: str, kind: str) -> list[str]:
    """Return the names of the places' folders, by number.

    kind: what a folder is of, for messages. Raises InputError for a folder whose name is not a
    number.
    """
    names = sorted(name for name in source_folder.list_names(folder) if not name.startswith("."))
    stray = [name for name in names if "." in name]  # a file, such as Thumbs.db
    if stray:
        source_folder.add_note(
            f"files of {folder} left out because they are no {kind}'s folder: {join_first(stray)}"
        )
    places = [name for name in names if name not in stray]
    for name in places:
        if not is_number(name):
            raise InputError(
                f"{source_folder.join(folder)} holds {name!r},"
                f" which is not a {kind}'s number; remove it"
            )
    return sorted(places, key=int)


def find_images(
    source_folder: SourceFolder,
    folders: Sequence[str],
    extensions: Sequence[str] = EXTENSIONS,
) -> Iterator[list[str]]:
    """Yield the paths of the images in each folder, by name. Notes how many files are others."""
    source_folder.prefetch(folders)
    others = []
    for folder in folders:
        images = []
        for name in sorted(source_folder.list_names(folder)):
            if name.startswith("."):  # written by a file manager or an archive tool
                continue
            if PurePosixPath(name).suffix.lower() in extensions:
                images.append(f"{folder}/{name}")
            else:
                others.append(f"{folder}/{name}")
        yield images
    if others:
        source_folder.add_note(
            f"files left out that are not {', '.join(extensions)}:"
            f" {len(others):,}: {join_first(others)}"
        )


def make_rows(source_folder: SourceFolder, images: Sequence[PlaceImage]) -> list[Row]:
    """Return a row for each image; its id is its number."""
    return [
        Row(
            id=number,
            place_id=image.place_id,
            uri=source_folder.join(image.path),
            split=image.split,
            lat=image.lat,
            lon=image.lon,
            region=image.region,
            source_id=image.path,
        )
        for number, image in enumerate(images)
    ]


def make_tile_rows(rows: Sequence[Row], sizes_m: Sequence[float]) -> ViewRows:
    """Return reference rows to write with size_m, the sides of the tiles' ground in metres."""
    plain = ViewRows.from_list(rows, "references")
    sizes: Floats64 = np.array(sizes_m, np.float64)

    def make_tables(kept: Bools) -> Iterator[pa.Table]:
        field = OPTIONAL["references"].field("size_m")
        start = 0
        chosen = sizes[kept]
        for table in plain.make_tables(kept):
            values = pa.array(chosen[start : start + len(table)], field.type)
            start += len(table)
            yield table.select(SCHEMAS["references"].names).append_column(field, values)

    return ViewRows(plain.place_ids, plain.splits, make_tables)
