"""Pair the queries of a list with the tiles of another, and divide places into train and test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.sphere import metres_between, unit_sphere, unroll_longitudes
from s4g_ray.data.tables.view_columns import SPLIT_CODES
from s4g_ray.datasets.lists.image_lists import ImageList, number_keys
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.datasets.lists.pair_distances import report_distances
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.errors import InputError

POINTS_AT_ONCE = 1 << 20  # photos that are matched with tiles at once
APART = 4.0  # on the axis of places: further than the sphere is wide


def assign_places(
    source_folder: SourceFolder, tiles: ImageList, photos: ImageList, options: ListOptions
) -> None:
    """Set places and splits; photos that have no place keep -1.

    Reports the distances of pairs. Raises InputError for pairs that are too far apart, and as
    split_by_strip does.
    """
    if options.pair == "key":
        unmatched = number_keys(tiles, photos)
        if len(unmatched):
            key = photos.column("key")[int(unmatched[0])].as_py()
            source_folder.add_note(
                f"queries left out because no reference has their key: {len(unmatched):,},"
                f" the first {key!r} at {photos.locate(int(unmatched[0]))}"
            )
    else:
        _pair_nearest(tiles, photos)
    _check_distances(source_folder, tiles, photos, options)
    if options.split_column is None:
        _split_by_strip(tiles, photos, options.test_fraction)


def _pair_nearest(tiles: ImageList, photos: ImageList) -> None:
    """Make each tile a place, and match each photo with the nearest tile of its split.

    Tiles whose image is missing are included.
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
        for part in _blocks(matched):
            points = unit_sphere(photos.lat[part], photos.lon[part])
            photos.place_ids[part] = candidates[tree.query(points, workers=-1)[1]]


def _check_distances(
    source_folder: SourceFolder, tiles: ImageList, photos: ImageList, options: ListOptions
) -> None:
    """Take the place from photos that are too far from the nearest tile of it."""
    metres = np.full(len(photos), np.nan)
    if options.pair == "key":
        _measure_to_places(tiles, photos, metres)
    else:
        for start in range(0, len(photos), POINTS_AT_ONCE):
            rows = slice(start, start + POINTS_AT_ONCE)
            metres[rows] = _measure(photos, rows, tiles, photos.place_ids[rows])
    if np.isnan(metres).all():
        return

    def make_tree() -> cKDTree:
        located = np.isfinite(tiles.lat)
        return cKDTree(unit_sphere(tiles.lat[located], tiles.lon[located]))

    far = report_distances(source_folder, photos, metres, make_tree, options.max_distance_m)
    photos.place_ids[far] = -1


def _measure_to_places(tiles: ImageList, photos: ImageList, metres: Floats64) -> None:
    """Set the metres of each photo to the nearest tile of its place, where both have positions."""
    located = np.flatnonzero(np.isfinite(tiles.lat))
    asked = np.flatnonzero((photos.place_ids >= 0) & np.isfinite(photos.lat))
    asked = asked[np.isin(photos.place_ids[asked], tiles.place_ids[located])]
    if not len(asked):
        return
    tree = cKDTree(_points_of_places(tiles, located))
    for part in _blocks(asked):
        nearest = located[tree.query(_points_of_places(photos, part), workers=-1)[1]]
        metres[part] = _measure(photos, part, tiles, nearest)


def _points_of_places(images: ImageList, rows: Ints) -> Floats64:
    """Return points [N, 4]: on the sphere, and apart by place."""
    xyz = unit_sphere(images.lat[rows], images.lon[rows])
    return np.column_stack([xyz, APART * images.place_ids[rows]])


def _measure(photos: ImageList, rows: Ints | slice, tiles: ImageList, nearest: Ints) -> Floats64:
    """Return the metres between photos and tiles."""
    lat = tiles.lat[nearest]
    return metres_between(photos.lat[rows], photos.lon[rows], lat, tiles.lon[nearest])


def _blocks(rows: Ints) -> Iterator[Ints]:
    for start in range(0, len(rows), POINTS_AT_ONCE):
        yield rows[start : start + POINTS_AT_ONCE]


def _split_by_strip(tiles: ImageList, photos: ImageList, fraction: float) -> None:
    """Make the easternmost share of the places test and the others train.

    A place is at the mean longitude of its tiles; photos have the split of their place. Raises
    InputError for a tile without coordinates.
    """
    unknown = np.flatnonzero(np.isnan(tiles.lon))
    if len(unknown):
        raise InputError(
            f"{tiles.locate(int(unknown[0]))}: without coordinates there is no eastern strip to"
            " test on; give --split-column"
        )
    lon = unroll_longitudes(tiles.lon)
    mean_lon = np.bincount(tiles.place_ids, lon) / np.bincount(tiles.place_ids)
    in_strip = choose_eastern_strip(mean_lon, fraction)
    codes = np.where(in_strip, SPLIT_CODES["test"], SPLIT_CODES["train"]).astype(np.uint8)
    tiles.splits = codes[tiles.place_ids]
    photos.splits = codes[photos.place_ids]  # of those without a place: not used


def choose_eastern_strip(lon: Floats64, fraction: float) -> Bools:
    """Return which of lon[N] belong to the easternmost share of the ground, also across 180.

    East is the end of the smallest span of longitudes that holds all. Equal longitudes stay
    together, so the share is the nearest possible one.
    """
    lon = unroll_longitudes(lon)
    values, counts = np.unique(lon, return_counts=True)
    # num_east[i]: points at values[i] or east of it; the last entry, 0, is an empty strip
    num_east = np.append(np.cumsum(counts[::-1])[::-1], 0)
    first = int(np.argmin(np.abs(num_east - fraction * len(lon))))
    westernmost = values[first] if first < len(values) else np.inf
    return np.asarray(lon >= westernmost)
