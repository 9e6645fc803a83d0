"""Pair photos with the tiles of a region: a data set of tiles with coordinates and sizes.

The tiles keep their ids and the bytes of their shards. A photo's place is, of the tiles that hold
it, the one with the nearest centre; the others are its semi-positives. With a split column, a tile
has the split of its photos.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.format.image_paths import resolve
from s4g_ray.data.sphere import EARTH_RADIUS_M, metres_between, unit_sphere
from s4g_ray.data.tables.view_columns import SPLIT_CODES
from s4g_ray.datasets.lists.image_lists import ImageList
from s4g_ray.datasets.lists.pair_distances import explain_far, report_distances
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.datasets.source_rows import ViewRows
from s4g_ray.errors import InputError
from s4g_ray.storage import files

POINTS_AT_ONCE = 1 << 16  # photos whose tiles are found at once
COLUMNS = ["uri", "offset", "length", "region", "source_id", "size_m"]
# The split of a tile that photos of several splits show: the first of these. A photo for training
# is left out where its tile is held out.
HELD_OUT_FIRST = ("test", "val", "train")


@dataclass
class RegionTiles:
    """The tiles of a region, sorted by id: arrays [T]. place_ids are the ids."""

    dataset: GeoDataset
    ids: Ints
    lat: Floats64
    lon: Floats64
    size_m: Floats64  # NaN where unknown
    splits: np.ndarray[tuple[int], np.dtype[np.uint8]]  # as in SPLIT_CODES


def is_region(uri: str) -> bool:
    """Return whether a URI is a data set's folder, not a list of images."""
    return not uri.endswith((".csv", ".parquet")) and files.exists(files.join(uri, "dataset.json"))


def open_region(uri: str) -> RegionTiles:
    """Open the tiles of a data set. Raises InputError when it is none, or has no coordinates."""
    dataset = open_dataset(uri)
    table = dataset.references.to_table(columns=["id", "lat", "lon", "size_m", "split"])
    table = table.sort_by("id")
    lat = pc.fill_null(table["lat"], float("nan")).to_numpy()
    if not len(table) or np.isnan(lat).any():
        raise InputError(
            f"{dataset.uri}: {int(np.isnan(lat).sum()):,} of {len(table):,} references have no"
            " coordinates; photos are paired by them"
        )
    codes = pc.index_in(table["split"], value_set=pa.array(list(SPLIT_CODES)))
    return RegionTiles(
        dataset=dataset,
        ids=table["id"].to_numpy(),
        lat=lat,
        lon=table["lon"].to_numpy(),
        size_m=pc.fill_null(table["size_m"], float("nan")).to_numpy().astype(np.float64),
        splits=np.asarray(codes).astype(np.uint8),
    )


def pair_photos(
    source_folder: SourceFolder,
    tiles: RegionTiles,
    photos: ImageList,
    max_distance_m: float | None,
) -> list[Ints]:
    """Set the places of photos: of the tiles that hold it the one with the nearest centre.

    Where the size of some tiles is unknown, or with max_distance_m: the tile with the nearest
    centre, within that distance. Photos without a place keep -1. Returns for each photo the ids of
    the other tiles that hold it. Raises InputError as report_distances does.
    """
    by_distance = max_distance_m is not None or bool(np.isnan(tiles.size_m).any())
    tree = cKDTree(unit_sphere(tiles.lat, tiles.lon))
    others: list[Ints] = []
    for start in range(0, len(photos), POINTS_AT_ONCE):
        rows = slice(start, start + POINTS_AT_ONCE)
        lat = photos.lat[rows]
        lon = photos.lon[rows]
        holding = _find_holding(tiles, lat, lon)
        if by_distance:
            place_ids = tiles.ids[tree.query(unit_sphere(lat, lon), workers=-1)[1]]
        else:
            place_ids = _choose_nearest(tiles, lat, lon, holding)
        photos.place_ids[rows] = place_ids
        for place, found in zip(place_ids, holding, strict=True):
            ids = tiles.ids[found]
            others.append(np.sort(ids[ids != place]))
    lost = np.flatnonzero(photos.place_ids < 0)
    if len(lost):
        note = f"queries left out because no tile holds their place: {len(lost):,}"
        fault = explain_far(photos, lost, tree, float(np.nanmax(tiles.size_m)))
        source_folder.add_note(f"{note}; {fault}" if fault else note)
    placed = np.flatnonzero(photos.place_ids >= 0)
    if len(placed):
        chosen = np.searchsorted(tiles.ids, photos.place_ids[placed])
        metres = np.full(len(photos), np.nan)
        metres[placed] = metres_between(
            photos.lat[placed], photos.lon[placed], tiles.lat[chosen], tiles.lon[chosen]
        )
        limit = max_distance_m if by_distance else np.inf  # those in a tile are near it
        far = report_distances(source_folder, photos, metres, lambda: tree, limit)
        photos.place_ids[far] = -1
    return others


def _choose_nearest(tiles: RegionTiles, lat: Floats64, lon: Floats64, holding: list[Ints]) -> Ints:
    """Return the id of the nearest of the tiles that hold each point, -1 where none does."""
    place_ids = np.full(len(lat), -1, np.int64)
    for point, rows in enumerate(holding):
        if len(rows):
            metres = metres_between(lat[point], lon[point], tiles.lat[rows], tiles.lon[rows])
            place_ids[point] = tiles.ids[rows[np.argmin(metres)]]
    return place_ids


def _find_holding(tiles: RegionTiles, lat: Floats64, lon: Floats64) -> list[Ints]:
    """Return for each point the rows of the tiles whose squares hold it, ascending."""
    found: list[list[int]] = [[] for _ in range(len(lat))]
    points = unit_sphere(lat, lon)
    for size in np.unique(tiles.size_m[~np.isnan(tiles.size_m)]):
        rows = np.flatnonzero(tiles.size_m == size)
        tree = cKDTree(unit_sphere(tiles.lat[rows], tiles.lon[rows]))
        # half a diagonal, and what the ellipsoid differs from the sphere
        near = tree.query_ball_point(points, size * 0.72 / EARTH_RADIUS_M, workers=-1)
        for point, candidates in enumerate(near):
            chosen = rows[candidates]
            north = metres_between(tiles.lat[chosen], lon[point], lat[point], lon[point])
            east = metres_between(lat[point], tiles.lon[chosen], lat[point], lon[point])
            found[point].extend(chosen[np.maximum(north, east) <= size / 2].tolist())
    return [np.sort(np.array(one, np.int64)) for one in found]


def split_tiles(tiles: RegionTiles, photos: ImageList) -> None:
    """Give each tile with photos the split of its photos, in the order of HELD_OUT_FIRST."""
    for split in reversed(HELD_OUT_FIRST):
        code = SPLIT_CODES[split]
        places = photos.place_ids[(photos.splits == code) & (photos.place_ids >= 0)]
        tiles.splits[np.searchsorted(tiles.ids, places)] = code


def make_tile_rows(tiles: RegionTiles) -> ViewRows:
    """Return the rows of all tiles: with their ids, and the byte ranges of the region's shards.

    Their values are shown as in the region.
    """

    def make_tables(kept: Bools) -> Iterator[pa.Table]:
        for batch in tiles.dataset.references.to_batches(columns=["id", "lat", "lon", *COLUMNS]):
            rows = np.searchsorted(tiles.ids, np.asarray(batch["id"]))
            chosen = kept[rows]
            if chosen.any():
                table = pa.Table.from_batches([batch]).filter(pa.array(chosen))
                yield _make_table(tiles, table, rows[chosen])

    return ViewRows(tiles.ids, tiles.splits, make_tables, tiles.dataset.values)


def _make_table(tiles: RegionTiles, table: pa.Table, rows: Ints) -> pa.Table:
    """Return the canonical columns of some tiles; uris are absolute."""
    names = table["uri"].combine_chunks().dictionary_encode()
    uris = [resolve(tiles.dataset.images_root, uri) for uri in names.dictionary.to_pylist()]
    absolute = pa.DictionaryArray.from_arrays(names.indices, pa.array(uris, pa.string()))
    splits = pa.DictionaryArray.from_arrays(pa.array(tiles.splits[rows]), list(SPLIT_CODES))
    columns = {name: table[name] for name in ("id", "lat", "lon", *COLUMNS)}
    columns |= {
        "place_id": table["id"],
        "uri": absolute.cast(pa.string()),
        "split": splits.cast(pa.string()),
    }
    if table["size_m"].null_count == len(table):
        del columns["size_m"]
    return pa.table(columns)
