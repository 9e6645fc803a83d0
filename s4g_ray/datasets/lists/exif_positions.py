"""Take positions and headings of queries from the photos' own tags, where a list has none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from s4g_ray.amounts import count_noun, join_first
from s4g_ray.data.images import list_formats
from s4g_ray.data.photos.exif import read_exif, read_heading
from s4g_ray.data.photos.photo_files import is_video, list_photos
from s4g_ray.data.pixels.raw_values import describe_content
from s4g_ray.datasets.lists.file_names import describe_odd, is_utf8
from s4g_ray.datasets.lists.image_lists import ImageList
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files

HEAD_BYTES = 512  # of a photo: tell its format, or what it is instead
NUM_READERS = 16  # photos whose tags are read at a time: object stores answer slowly


@dataclass(frozen=True)
class PhotoTags:
    """What a photo says of itself: degrees, None for what it does not.

    fault: why it cannot be opened.
    """

    lat: float | None = None
    lon: float | None = None
    heading_deg: float | None = None
    is_magnetic: bool = False
    fault: str | None = None


def list_folder(
    source_folder: SourceFolder, folder: str, tiles: ImageList | None, options: ListOptions
) -> ImageList:
    """List the photos in a folder and below, but those that are tiles, as a list without positions.

    Raises InputError for a folder without photos, and for options that need a list.
    """
    named = {"--split-column": options.split_column, "--id-column": options.id_column}
    for option, column in named.items():
        if column is not None or options.pair == "key":
            reason = "--pair key" if options.pair == "key" else f"{option} {column}"
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

    Reads the start of each photo that lacks one. Counts and names photos that cannot be opened, and
    those that have no position.
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
    num_headings = 0
    num_magnetic = 0
    for row, tag in zip(rows.tolist(), tags, strict=True):
        if np.isnan(photos.lat[row]) and tag.lat is not None and tag.lon is not None:
            photos.lat[row] = tag.lat
            photos.lon[row] = tag.lon
            num_filled += 1
        if np.isnan(headings[row]) and tag.heading_deg is not None:
            headings[row] = tag.heading_deg
            num_headings += 1
            num_magnetic += tag.is_magnetic
    photos.headings = None if np.isnan(headings).all() else headings
    filled = count_noun(num_filled, "position")
    note = f"from the photos' own tags: {filled}, {count_noun(num_headings, 'heading')}"
    if num_magnetic:
        note += f" ({num_magnetic:,} of them from magnetic north, taken as they are)"
    source_folder.add_note(note)
    read = list(zip(rows, asked_paths, tags, strict=True))
    bad = [f"{path} ({tag.fault})" for _, path, tag in read if tag.fault is not None]
    if bad:
        source_folder.add_note(f"photos that cannot be opened: {len(bad):,}: {join_first(bad)}")
    lacking = [path for row, path, tag in read if np.isnan(photos.lat[row]) and tag.fault is None]
    if lacking:
        source_folder.add_note(
            f"photos without a position in their tags: {len(lacking):,}: {join_first(lacking)}"
        )


def _make_reader(source_folder: SourceFolder) -> Callable[[str], PhotoTags]:
    return lambda path: read_tags(source_folder.join(path))


def read_tags(uri: str) -> PhotoTags:
    """Read position and heading of a photo, or why it cannot be opened.

    Raises BadImageError for a HEIC photo without pillow-heif, and StoreError.
    """
    filesystem, path = files.filesystem_of(uri)
    start = b""
    try:
        with filesystem.open(path, "rb") as stream:
            start = stream.read(HEAD_BYTES)
            formats = list_formats(start, uri)
            stream.seek(0)
            with Image.open(stream, formats=formats) as image:
                position = read_exif(image)
                heading, is_magnetic = read_heading(image)
    except (InputError, RunError):
        raise
    except UnidentifiedImageError:
        return PhotoTags(fault=describe_content(start) if start else "an empty file")
    except Exception as error:  # a damaged file raises many kinds; the photo is named with it
        return PhotoTags(fault=f"{type(error).__name__}: {error}")
    if position is None:
        return PhotoTags(heading_deg=heading, is_magnetic=is_magnetic)
    return PhotoTags(position.lat, position.lon, heading, is_magnetic)
