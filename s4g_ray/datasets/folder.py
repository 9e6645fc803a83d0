"""Convert a plain folder: images of both views, and two lists of them in CSV or Parquet.

The lists have coordinates, or a common key for the images of a place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.arrays import Bools, Ints
from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.data.format.image_paths import are_whole
from s4g_ray.data.tables.view_columns import SPLIT_CODES
from s4g_ray.datasets.lists.exif_positions import fill_from_exif, list_folder
from s4g_ray.datasets.lists.image_lists import ImageList, read_list
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.datasets.lists.name_matching import find_matches
from s4g_ray.datasets.lists.pairing import assign_places, choose_eastern_strip
from s4g_ray.datasets.region_tiles import (
    is_region,
    make_tile_rows,
    open_region,
    pair_photos,
    split_tiles,
)
from s4g_ray.datasets.source import SourceFolder, make_options
from s4g_ray.datasets.source_rows import ViewRows
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

LIST_ENDINGS = (".csv", ".parquet", ".tsv", ".txt")
VIEWS = {"references": "aerial image", "queries": "photo"}


def convert(
    source: str,
    target: str,
    *,
    queries: str | None = None,
    references: str | None = None,
    name: str | None = None,
    strict: bool = False,
    report: Report = ignore_report,
    **options: Any,
) -> GeoDataset:
    """Convert a folder of images that two lists describe; images stay where they are.

    A list is a CSV file with a header, in any dialect, or a Parquet file: by default `queries.csv`,
    or else `.parquet`, `.tsv` or `.txt`, likewise `references`. Rows are read in blocks; of each,
    about 50 bytes and its path stay in memory. Options are those of ListOptions. `pair="nearest"`:
    a query's place is the tile nearest on the great circle, within its own split when there is a
    split column (a `gallery` tile is never chosen). `pair="key"`: equal keys are one place, and
    coordinates may be empty. Queries farther than `max_distance_m` from their place are left out.
    Without a split column the easternmost `test_fraction` of the places is test: a strip, because a
    random draw would put test places next to train places. `from_exif`: positions and headings that
    a list of queries lacks are those of the photos' tags; `queries` may then be a folder, by
    default SOURCE. `references` may also be a data set of tiles, as region_tiles.py pairs them.
    `name` defaults to the name of the source folder.
    Raises InputError with file and line for missing columns, bad values, repeated ids, and queries
    far from all tiles, for missing images when `strict`, and for a target that holds a data set.
    """
    list_options = make_options(ListOptions, "folder", options)
    target = files.absolute(target)
    refuse_existing(target)
    source_folder = SourceFolder(source, report)
    name = name or source_folder.uri.rstrip("/").rpartition("/")[2] or "folder"
    if references is not None and is_region(files.absolute(references)):
        rows = _pair_with_region(source_folder, references, queries, list_options)
    else:
        rows = _pair_lists(source_folder, references, queries, list_options)
    return source_folder.write_rows(target, *rows, name=name, views=VIEWS, strict=strict)


def _read_photos(
    source_folder: SourceFolder, queries: str | None, tiles: ImageList | None, options: ListOptions
) -> ImageList:
    """Read the list of the queries; with from_exif a folder of them, and what their tags say."""
    name = queries or _find_list(source_folder, "queries")
    if not options.from_exif:
        return read_list(source_folder, name, "queries", options)
    is_named = queries is not None
    if name.endswith(LIST_ENDINGS) and (is_named or files.exists(source_folder.join(name))):
        photos = read_list(source_folder, name, "queries", options)
    else:
        photos = list_folder(source_folder, queries or "", tiles, options)
    # before the tags are read, of all photos: those without a position are left out next
    _find_images(source_folder, photos, np.ones(len(photos), bool), options.match_names)
    fill_from_exif(source_folder, photos)
    if options.pair == "nearest":
        photos = photos.keep(np.isfinite(photos.lat))
    if not len(photos):
        raise InputError(
            f"{photos.uri}: no photo has a position in its tags; give a list with positions"
        )
    return photos


def _find_list(source_folder: SourceFolder, view: str) -> str:
    """Return the name of the list of a view: of those that are there the first of LIST_ENDINGS."""
    names = [f"{view}{ending}" for ending in LIST_ENDINGS]
    found = (name for name in names if files.exists(source_folder.join(name)))
    return next(found, names[0])


def _pair_lists(
    source_folder: SourceFolder, references: str | None, queries: str | None, options: ListOptions
) -> tuple[ViewRows, ViewRows]:
    """Return the rows of the tiles of a list, and of the photos that have a place there."""
    tile_list = references or _find_list(source_folder, "references")
    tiles = read_list(source_folder, tile_list, "references", options)
    photos = _read_photos(source_folder, queries, tiles, options)
    assign_places(source_folder, tiles, photos, options)
    return (
        _make_rows(source_folder, tiles, options.match_names),
        _make_rows(source_folder, photos, options.match_names, is_matched=options.from_exif),
    )


def _pair_with_region(
    source_folder: SourceFolder, references: str, queries: str | None, options: ListOptions
) -> tuple[ViewRows, ViewRows]:
    """Return the rows of the tiles of a data set, and of the photos that have a place there."""
    if options.pair != "nearest":
        raise InputError(
            f"--pair {options.pair} needs a list of the tiles; {references} has no keys"
        )
    tiles = open_region(references)
    photos = _read_photos(source_folder, queries, None, options)
    others = pair_photos(source_folder, tiles, photos, options.max_distance_m)
    if options.split_column is None:
        in_strip = choose_eastern_strip(tiles.lon, options.test_fraction)
        tiles.splits[:] = np.where(in_strip, SPLIT_CODES["test"], SPLIT_CODES["train"])
        rows = np.searchsorted(tiles.ids, np.maximum(photos.place_ids, tiles.ids[0]))
        photos.splits = tiles.splits[rows]  # of those without a place: not used
    else:
        split_tiles(tiles, photos)
    return make_tile_rows(tiles), _make_rows(
        source_folder, photos, options.match_names, others, is_matched=options.from_exif
    )


def _make_rows(
    source_folder: SourceFolder,
    images: ImageList,
    match_names: bool,
    others: Sequence[Ints] | None = None,
    *,
    is_matched: bool = False,
) -> ViewRows:
    """Return the rows of images that have a place and exist.

    others: of queries, the semi-positive places of each. is_matched: names were matched before.
    """
    asked = images.place_ids >= 0
    if is_matched:
        chosen = source_folder.has_images(images.column("path"), asked)
    else:
        chosen = _find_images(source_folder, images, asked, match_names)

    def make_tables(kept: Bools) -> Iterator[pa.Table]:
        rows_kept = chosen.copy()
        rows_kept[chosen] = kept
        for rows, texts in images.iterate(rows_kept):
            table = _make_table(source_folder, images, rows, texts)
            if others is not None:
                places = [others[row].tolist() or None for row in rows]
                table = table.append_column(
                    "semi_positives", pa.array(places, pa.list_(pa.int64()))
                )
            yield table

    return ViewRows(images.place_ids[chosen], images.splits[chosen], make_tables)


def _find_images(
    source_folder: SourceFolder, images: ImageList, asked: Bools, match_names: bool
) -> Bools:
    """Return which of the asked[N] images exist, also under a name that is written otherwise.

    Such names are taken with match_names, and reported without.
    """
    paths = images.column("path")
    chosen = source_folder.has_images(paths, asked)
    is_missing = asked & ~chosen
    if not is_missing.any():
        return chosen
    missing = dict.fromkeys(paths.filter(pa.array(is_missing)).to_pylist())
    matches = find_matches(source_folder, missing, paths)
    if not matches.paths:
        return chosen
    text = f"{images.uri}: missing images with a likely match: {matches.describe()}"
    if not match_names:
        source_folder.report(f"{text}; take them with --match-names")
        return chosen
    source_folder.add_note(f"{text}: taken")
    source_folder.forget_missing(matches.paths)
    images.replace_paths(matches.paths)
    return source_folder.has_images(images.column("path"), asked)


def _make_table(
    source_folder: SourceFolder, images: ImageList, rows: Ints, texts: pa.Table
) -> pa.Table:
    """Return the canonical columns of some rows."""
    paths = texts["path"]
    joined = pc.binary_join_element_wise(source_folder.uri.rstrip("/"), paths, "/")
    splits = pa.DictionaryArray.from_arrays(pa.array(images.splits[rows]), list(SPLIT_CODES))
    columns = {
        "id": images.ids[rows],
        "place_id": images.place_ids[rows],
        "uri": pc.if_else(are_whole(paths), paths, joined),
        "lat": pa.array(images.lat[rows], from_pandas=True),
        "lon": pa.array(images.lon[rows], from_pandas=True),
        "split": splits.cast(pa.string()),
        "source_id": paths,
    }
    if "region" in texts.column_names:
        columns["region"] = texts["region"]
    if images.headings is not None:
        columns["heading_deg"] = pa.array(images.headings[rows], from_pandas=True)
    return pa.table(columns)
