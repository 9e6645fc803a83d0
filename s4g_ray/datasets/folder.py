"""Convert a plain folder: images of both views, and two lists of them in CSV or Parquet.

The lists have coordinates, or a common key for the images of a place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.data.sphere import metres_between, unit_sphere
from s4g_ray.data.tables.view_columns import SPLIT_CODES
from s4g_ray.datasets.lists.image_lists import ImageList, number_keys, read_list
from s4g_ray.datasets.lists.list_columns import ListOptions, Pair
from s4g_ray.datasets.region_tiles import (
    is_region,
    make_tile_rows,
    open_region,
    pair_photos,
    split_tiles,
)
from s4g_ray.datasets.source import Report, SourceFolder, ignore_report
from s4g_ray.datasets.source_rows import ViewRows
from s4g_ray.errors import InputError
from s4g_ray.storage import files

POINTS_AT_ONCE = 1 << 20  # photos that are matched with tiles at once
VIEWS = {"references": "aerial image", "queries": "photo"}


def convert(
    source: str,
    target: str,
    *,
    queries: str | None = None,
    references: str | None = None,
    path_column: str = "path",
    lat_column: str = "lat",
    lon_column: str = "lon",
    pair: Pair = "nearest",
    key_column: str = "key",
    max_distance_m: float | None = None,
    split_column: str | None = None,
    test_fraction: float = 0.2,
    region_column: str | None = None,
    heading_column: str | None = None,
    id_column: str | None = None,
    name: str | None = None,
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a folder of images that two lists describe; images stay where they are.

    A list is a CSV file with a header, or a Parquet file: by default `queries.csv`, or else
    `queries.parquet`, likewise `references`. Rows are read in blocks; of each, about 50 bytes and
    its path stay in memory. Paths are relative to the source, or absolute. `pair="nearest"`: a
    query's place is the tile nearest on the great circle, within its own split when there is a
    split column (a `gallery` tile is never chosen); queries farther than `max_distance_m` are left
    out. `pair="key"`: equal keys are one place, and coordinates may be empty. Without a split
    column the easternmost `test_fraction` of the places is test: a strip, because a random draw
    would put test places next to train places. Columns that an option names are needed in both
    lists; headings (degrees) in the queries only. `references` may also be a data set of tiles, as
    region_tiles.py pairs them. `name` defaults to the name of the source folder.
    Raises InputError with file and line for missing columns, bad values and repeated ids, for
    missing images when `strict`, and for a target that holds a data set.
    """
    options = ListOptions(
        pair=pair,
        path_column=path_column,
        lat_column=lat_column,
        lon_column=lon_column,
        key_column=key_column,
        max_distance_m=max_distance_m,
        split_column=split_column,
        test_fraction=test_fraction,
        region_column=region_column,
        heading_column=heading_column,
        id_column=id_column,
    )
    target = files.absolute(target)
    refuse_existing(target)
    source_folder = SourceFolder(source, report)
    name = name or source_folder.uri.rstrip("/").rpartition("/")[2] or "folder"
    if references is not None and is_region(files.absolute(references)):
        rows = _pair_with_region(source_folder, references, queries, options)
    else:
        rows = _pair_lists(source_folder, references, queries, options)
    return source_folder.write_rows(target, *rows, name=name, views=VIEWS, strict=strict)


def _find_list(source_folder: SourceFolder, view: str) -> str:
    """Return the name of the list of a view: Parquet where there is no CSV."""
    has_csv = files.exists(source_folder.join(f"{view}.csv"))
    if not has_csv and files.exists(source_folder.join(f"{view}.parquet")):
        return f"{view}.parquet"
    return f"{view}.csv"


def _pair_lists(
    source_folder: SourceFolder, references: str | None, queries: str | None, options: ListOptions
) -> tuple[ViewRows, ViewRows]:
    """Return the rows of the tiles of a list, and of the photos that have a place there."""
    tile_list = references or _find_list(source_folder, "references")
    tiles = read_list(source_folder, tile_list, "references", options)
    photo_list = queries or _find_list(source_folder, "queries")
    photos = read_list(source_folder, photo_list, "queries", options)
    _assign_places(source_folder, tiles, photos, options)
    return _make_rows(source_folder, tiles), _make_rows(source_folder, photos)


def _pair_with_region(
    source_folder: SourceFolder, references: str, queries: str | None, options: ListOptions
) -> tuple[ViewRows, ViewRows]:
    """Return the rows of the tiles of a data set, and of the photos that have a place there."""
    if options.pair != "nearest":
        raise InputError(
            f"pair={options.pair!r} needs a list of the tiles; {references} has no keys"
        )
    tiles = open_region(references)
    photo_list = queries or _find_list(source_folder, "queries")
    photos = read_list(source_folder, photo_list, "queries", options)
    others = pair_photos(source_folder, tiles, photos, options.max_distance_m)
    if options.split_column is None:
        in_strip = choose_eastern_strip(tiles.lon, options.test_fraction)
        tiles.splits[:] = np.where(in_strip, SPLIT_CODES["test"], SPLIT_CODES["train"])
        rows = np.searchsorted(tiles.ids, np.maximum(photos.place_ids, tiles.ids[0]))
        photos.splits = tiles.splits[rows]  # of those without a place: not used
    else:
        split_tiles(tiles, photos)
    return make_tile_rows(tiles), _make_rows(source_folder, photos, others)


def choose_eastern_strip(lon: Floats64, fraction: float) -> Bools:
    """Return which of lon[N] belong to the easternmost share.

    Equal longitudes stay together, so the share is the nearest possible one.
    """
    values, counts = np.unique(lon, return_counts=True)
    # num_east[i]: points at values[i] or east of it; the last entry, 0, is an empty strip
    num_east = np.append(np.cumsum(counts[::-1])[::-1], 0)
    first = int(np.argmin(np.abs(num_east - fraction * len(lon))))
    westernmost = values[first] if first < len(values) else np.inf
    return np.asarray(lon >= westernmost)


def _make_rows(
    source_folder: SourceFolder, images: ImageList, others: Sequence[Ints] | None = None
) -> ViewRows:
    """Return the rows of images that have a place and exist.

    others: of queries, the semi-positive places of each.
    """
    chosen = source_folder.has_images(images.column("path"), images.place_ids >= 0)

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


def _make_table(
    source_folder: SourceFolder, images: ImageList, rows: Ints, texts: pa.Table
) -> pa.Table:
    """Return the canonical columns of some rows."""
    paths = texts["path"]
    is_whole = pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://"))
    joined = pc.binary_join_element_wise(source_folder.uri.rstrip("/"), paths, "/")
    splits = pa.DictionaryArray.from_arrays(pa.array(images.splits[rows]), list(SPLIT_CODES))
    columns = {
        "id": images.ids[rows],
        "place_id": images.place_ids[rows],
        "uri": pc.if_else(is_whole, paths, joined),
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


def _assign_places(
    source_folder: SourceFolder, tiles: ImageList, photos: ImageList, options: ListOptions
) -> None:
    """Set places and splits; photos that have no place keep -1."""
    if options.pair == "key":
        unmatched = number_keys(tiles, photos)
        if len(unmatched):
            key = photos.column("key")[int(unmatched[0])].as_py()
            source_folder.add_note(
                f"queries left out because no reference has their key: {len(unmatched):,},"
                f" the first {key!r} at {photos.locate(int(unmatched[0]))}"
            )
    else:
        _pair_nearest(source_folder, tiles, photos, options.max_distance_m)
    if options.split_column is None:
        _split_by_strip(tiles, photos, options.test_fraction)


def _pair_nearest(
    source_folder: SourceFolder, tiles: ImageList, photos: ImageList, max_distance_m: float | None
) -> None:
    """Make each tile a place, and match each photo with the nearest tile of its split.

    Tiles whose image is missing are included. Photos farther than max_distance_m get no place.
    """
    tiles.place_ids = np.arange(len(tiles))
    for split in np.unique(photos.splits):
        candidates = np.flatnonzero(tiles.splits == split)
        matched = np.flatnonzero(photos.splits == split)
        if not len(candidates):
            name = list(SPLIT_CODES)[split]
            raise InputError(
                f"{photos.locate(int(matched[0]))}: no reference has the split {name!r},"
                " so none can be its place"
            )
        tree = cKDTree(unit_sphere(tiles.lat[candidates], tiles.lon[candidates]))
        for start in range(0, len(matched), POINTS_AT_ONCE):
            part = matched[start : start + POINTS_AT_ONCE]
            points = unit_sphere(photos.lat[part], photos.lon[part])
            photos.place_ids[part] = candidates[tree.query(points, workers=-1)[1]]
    if max_distance_m is None:
        return
    far = np.zeros(len(photos), dtype=bool)
    for start in range(0, len(photos), POINTS_AT_ONCE):
        rows = slice(start, start + POINTS_AT_ONCE)
        nearest = photos.place_ids[rows]
        metres = metres_between(
            photos.lat[rows], photos.lon[rows], tiles.lat[nearest], tiles.lon[nearest]
        )
        far[rows] = metres > max_distance_m
    photos.place_ids[far] = -1
    if far.any():
        source_folder.add_note(
            f"queries left out because no tile is within {max_distance_m:g} m: {int(far.sum()):,}"
        )


def _split_by_strip(tiles: ImageList, photos: ImageList, fraction: float) -> None:
    """Make the easternmost share of the places test and the others train.

    A place is at the mean longitude of its tiles; photos have the split of their place. Raises
    InputError for a tile without coordinates.
    """
    unknown = np.flatnonzero(np.isnan(tiles.lon))
    if len(unknown):
        raise InputError(
            f"{tiles.locate(int(unknown[0]))}: without coordinates there is no eastern strip to"
            " test on; give split_column"
        )
    mean_lon = np.bincount(tiles.place_ids, tiles.lon) / np.bincount(tiles.place_ids)
    in_strip = choose_eastern_strip(mean_lon, fraction)
    codes = np.where(in_strip, SPLIT_CODES["test"], SPLIT_CODES["train"]).astype(np.uint8)
    tiles.splits = codes[tiles.place_ids]
    photos.splits = codes[photos.place_ids]  # of those without a place: not used
