"""Convert a plain folder: images of both views and two CSV files that list them.

The CSV files have coordinates, or a common key for the images of a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.data.sphere import metres_between, unit_sphere
from s4g_ray.datasets.image_lists import ListedImage, ListOptions, Pair, read_list
from s4g_ray.datasets.source import Report, Row, SourceFolder, ignore_report
from s4g_ray.errors import InputError
from s4g_ray.storage import files

VIEWS = {"references": "aerial image", "queries": "photo"}


def convert(
    source: str,
    target: str,
    *,
    queries: str = "queries.csv",
    references: str = "references.csv",
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
    """Convert a folder of images that two CSV files with a header list; images stay where they are.

    Paths are relative to the source, or absolute. `pair="nearest"`: a query's place is the tile
    nearest on the great circle, within its own split when there is a split column (a `gallery` tile
    is never chosen); queries farther than `max_distance_m` are left out. `pair="key"`: equal keys
    are one place, and coordinates may be empty. Without a split column the easternmost
    `test_fraction` of the places is test: a strip, because a random draw would put test places next
    to train places. Columns that an option names are needed in both files; headings (degrees) in
    the queries only. `name` defaults to the name of the source folder. Raises InputError with file
    and line for missing columns, bad values and repeated ids, for missing images when `strict`, and
    for a target that holds a data set.
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
    tiles = read_list(source_folder, references, "references", options)
    photos = read_list(source_folder, queries, "queries", options)
    tiles, photos = _assign_places(source_folder, tiles, photos, options)
    source_folder.prefetch(image.path.rpartition("/")[0] for image in [*tiles, *photos])
    reference_rows = _make_rows(source_folder, tiles)
    query_rows = _make_rows(source_folder, photos)
    name = name or source_folder.uri.rstrip("/").rpartition("/")[2] or "folder"
    return source_folder.write(
        target, reference_rows, query_rows, name=name, views=VIEWS, strict=strict
    )


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


def _make_rows(source_folder: SourceFolder, images: Sequence[ListedImage]) -> list[Row]:
    """Return a row for each image that exists."""
    return [
        Row(
            id=image.id,
            place_id=image.place_id,
            uri=source_folder.join(image.path),
            split=image.split,
            lat=image.lat,
            lon=image.lon,
            region=image.region,
            source_id=image.path,
            heading_deg=image.heading,
        )
        for image in images
        if source_folder.has_image(image.path)
    ]


def _assign_places(
    source_folder: SourceFolder,
    tiles: list[ListedImage],
    photos: list[ListedImage],
    options: ListOptions,
) -> tuple[list[ListedImage], list[ListedImage]]:
    """Return tiles and photos with their place and split, without photos that have no place."""
    if options.pair == "key":
        tiles, photos = _pair_by_key(source_folder, tiles, photos)
    else:
        tiles, photos = _pair_nearest(source_folder, tiles, photos, options.max_distance_m)
    if options.split_column is None:
        tiles, photos = _split_by_strip(tiles, photos, options.test_fraction)
    return tiles, photos


def _pair_by_key(
    source_folder: SourceFolder, tiles: list[ListedImage], photos: list[ListedImage]
) -> tuple[list[ListedImage], list[ListedImage]]:
    """Number the places in the order in which the tiles' keys first appear.

    Leaves out photos whose key no tile has.
    """
    places: dict[str, int] = {}
    for tile in tiles:
        places.setdefault(tile.key, len(places))
    matched = []
    unmatched = []
    for photo in photos:
        if photo.key in places:
            matched.append(replace(photo, place_id=places[photo.key]))
        else:
            unmatched.append(photo)
    if unmatched:
        source_folder.add_note(
            f"queries left out because no reference has their key: {len(unmatched):,},"
            f" the first {unmatched[0].key!r} at {unmatched[0].location}"
        )
    return [replace(tile, place_id=places[tile.key]) for tile in tiles], matched


def _pair_nearest(
    source_folder: SourceFolder,
    tiles: list[ListedImage],
    photos: list[ListedImage],
    max_distance_m: float | None,
) -> tuple[list[ListedImage], list[ListedImage]]:
    """Make each tile a place, and match each photo with the nearest tile of its split.

    Tiles whose image is missing are included. Leaves out photos farther than max_distance_m.
    """
    place_of = np.full(len(photos), -1, dtype=np.int64)
    tile_splits = np.array([tile.split for tile in tiles])
    photo_splits = np.array([photo.split for photo in photos])
    tile_positions = _positions(tiles)
    photo_positions = _positions(photos)
    for split in np.unique(photo_splits):
        candidates = np.flatnonzero(tile_splits == split)
        matched = np.flatnonzero(photo_splits == split)
        if not len(candidates):
            raise InputError(
                f"{photos[matched[0]].location}: no reference has the split {str(split)!r},"
                " so none can be its place"
            )
        tree = cKDTree(unit_sphere(*tile_positions[:, candidates]))
        nearest = tree.query(unit_sphere(*photo_positions[:, matched]))[1]
        place_of[matched] = candidates[nearest]
    metres = metres_between(*photo_positions, *tile_positions[:, place_of])
    near = np.full(len(photos), True)
    if max_distance_m is not None:
        near = metres <= max_distance_m
    if not near.all():
        source_folder.add_note(
            f"queries left out because no tile is within {max_distance_m:g} m:"
            f" {int((~near).sum()):,}"
        )
    kept = [replace(photos[row], place_id=int(place_of[row])) for row in np.flatnonzero(near)]
    return [replace(tile, place_id=number) for number, tile in enumerate(tiles)], kept


def _positions(images: Sequence[ListedImage]) -> Floats64:
    """Return latitudes and longitudes [2, N] in degrees."""
    lat = [image.lat for image in images]
    lon = [image.lon for image in images]
    return np.array([lat, lon], dtype=np.float64)


def _split_by_strip(
    tiles: list[ListedImage], photos: list[ListedImage], fraction: float
) -> tuple[list[ListedImage], list[ListedImage]]:
    """Make the easternmost share of the places test and the others train.

    A place is at the mean longitude of its tiles; photos have the split of their place. Raises
    InputError for a tile without coordinates.
    """
    longitudes: dict[int, list[float]] = {}
    for tile in tiles:
        if tile.lon is None:
            raise InputError(
                f"{tile.location}: without coordinates there is no eastern strip to test on;"
                " give split_column"
            )
        longitudes.setdefault(tile.place_id, []).append(tile.lon)
    mean_lon = np.array([np.mean(lon) for lon in longitudes.values()])
    in_strip = choose_eastern_strip(mean_lon, fraction)
    split_of = {
        place: "test" if is_test else "train"
        for place, is_test in zip(longitudes, in_strip, strict=True)
    }
    return (
        [replace(tile, split=split_of[tile.place_id]) for tile in tiles],
        [replace(photo, split=split_of[photo.place_id]) for photo in photos],
    )
