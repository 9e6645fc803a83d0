"""Take positions and headings of queries from the photos' own tags, where a list has none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from s4g_ray.data.images import list_formats
from s4g_ray.data.photos.exif import read_exif, read_heading
from s4g_ray.data.photos.photo_files import is_video, list_photos
from s4g_ray.datasets.lists.file_names import describe_odd, is_utf8
from s4g_ray.datasets.lists.image_lists import ImageList
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.datasets.source import SourceFolder, join_first
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files

NUM_READERS = 16  # photos whose tags are read at a time: object stores answer slowly


@dataclass(frozen=True)
class PhotoTags:
    """What a photo says of itself: degrees, None for what it does not."""

    lat: float | None = None
    lon: float | None = None
    heading_deg: float | None = None
    is_magnetic: bool = False


def list_folder(
    source_folder: SourceFolder, folder: str, tiles: ImageList | None, options: ListOptions
) -> ImageList:
    """List the photos in a folder and below, but those that are tiles, as a list without positions.

    Raises InputError for a folder without photos, and for options that need a list.
    """
    named = {"split_column": options.split_column, "id_column": options.id_column}
    for option, column in named.items():
        if column is not None or options.pair == "key":
            reason = "pair=key" if options.pair == "key" else f"{option}={column}"
            raise InputError(f"{reason} needs a list of the queries; a folder of photos has none")
    uri = source_folder.join(folder)
    top = source_folder.join("").rstrip("/") + "/"
    paths = [path.removeprefix(top) for path in list_photos([uri]) if not is_video(path)]
    odd = [path for path in paths if not is_utf8(path)]
    if odd:
        source_folder.add_note(
            f"{uri}: photos whose names are not UTF-8, left out: {describe_odd(odd)}"
        )
    column = pa.array([path for path in paths if is_utf8(path)], pa.string())
    if tiles is not None:
        listed = tiles.column("path")
        whole = pc.binary_join_element_wise(top.rstrip("/"), column, "/")
        is_tile = pc.or_(pc.is_in(column, value_set=listed), pc.is_in(whole, value_set=listed))
        column = column.filter(pc.invert(is_tile))
    if not len(column):
        raise InputError(f"{uri} holds no photo that is not a tile; name the photos by --queries")
    count = len(column)
    return ImageList(
        uri=uri,
        unit="photo",
        numbers=np.arange(count, dtype=np.int32),
        ids=np.arange(count, dtype=np.int64),
        lat=np.full(count, np.nan),
        lon=np.full(count, np.nan),
        headings=None,
        texts=[pa.table({"path": column})],
        splits=np.zeros(count, np.uint8),
        place_ids=np.full(count, -1, dtype=np.int64),
    )


def fill_from_exif(source_folder: SourceFolder, photos: ImageList) -> None:
    """Fill in positions and headings that are empty, by the photos' EXIF and XMP tags.

    Reads the start of each photo that lacks one. Counts and names photos that have no position.
    Raises BadImageError for a HEIC photo without pillow-heif.
    """
    headings = photos.headings
    if headings is None:
        headings = np.full(len(photos), np.nan, np.float32)
    asked = np.isnan(photos.lat) | np.isnan(headings)
    paths = photos.column("path")
    rows = np.flatnonzero(source_folder.has_images(paths, asked))
    asked_paths = paths.take(pa.array(rows)).to_pylist()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        tags = list(pool.map(_make_reader(source_folder), asked_paths))
    num_filled = 0
    for row, tag in zip(rows.tolist(), tags, strict=True):
        if np.isnan(photos.lat[row]) and tag.lat is not None and tag.lon is not None:
            photos.lat[row] = tag.lat
            photos.lon[row] = tag.lon
            num_filled += 1
        if np.isnan(headings[row]) and tag.heading_deg is not None:
            headings[row] = tag.heading_deg
    photos.headings = None if np.isnan(headings).all() else headings
    num_headings = sum(tag.heading_deg is not None for tag in tags)
    note = f"from the photos' own tags: {num_filled:,} positions, {num_headings:,} headings"
    num_magnetic = sum(tag.is_magnetic for tag in tags)
    if num_magnetic:
        note += f" ({num_magnetic:,} of them from magnetic north, taken as they are)"
    source_folder.add_note(note)
    lacking = [
        path for row, path in zip(rows, asked_paths, strict=True) if np.isnan(photos.lat[row])
    ]
    if lacking:
        source_folder.add_note(
            f"photos without a position in their tags: {len(lacking):,}: {join_first(lacking)}"
        )


def _make_reader(source_folder: SourceFolder) -> Callable[[str], PhotoTags]:
    return lambda path: read_tags(source_folder.join(path))


def read_tags(uri: str) -> PhotoTags:
    """Read position and heading of a photo; empty for a file that is no image.

    Raises BadImageError for a HEIC photo without pillow-heif, and StoreError.
    """
    filesystem, path = files.filesystem_of(uri)
    try:
        with filesystem.open(path, "rb") as stream:
            formats = list_formats(stream.read(64), uri)
            stream.seek(0)
            with Image.open(stream, formats=formats) as image:
                position = read_exif(image)
                heading, is_magnetic = read_heading(image)
    except (InputError, RunError):
        raise
    except Exception:  # a damaged file raises many kinds; the photo is named as one without tags
        return PhotoTags()
    if position is None:
        return PhotoTags(heading_deg=heading, is_magnetic=is_magnetic)
    return PhotoTags(position.lat, position.lon, heading, is_magnetic)
