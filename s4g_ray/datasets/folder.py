"""A plain folder: images of both views and two CSV files that list them, with coordinates or with a common key."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.data.image_table import View
from s4g_ray.data.schema import SPLITS
from s4g_ray.data.sphere import metres_between, unit_sphere
from s4g_ray.datasets.source import Report, Row, SourceFolder, is_number, silent, valid_position
from s4g_ray.errors import InputError
from s4g_ray.storage import files

Pair = Literal["nearest", "key"]
VIEWS = {"references": "aerial image", "queries": "photo"}


@dataclass(frozen=True)
class _Options:
    """How pairs are made and columns are named; fields named *_column are options of convert."""

    pair: Pair
    path_column: str
    lat_column: str
    lon_column: str
    key_column: str
    max_distance_m: float | None
    split_column: str | None
    test_fraction: float
    region_column: str | None
    heading_column: str | None
    id_column: str | None

    def __post_init__(self) -> None:
        if self.pair not in get_args(Pair):
            raise InputError(f"pair={self.pair!r} is none of {', '.join(get_args(Pair))}")
        if not 0 <= self.test_fraction <= 1:
            raise InputError(f"test_fraction={self.test_fraction} is not within 0..1")
        if self.max_distance_m is not None and (
            self.pair != "nearest" or not self.max_distance_m > 0
        ):
            raise InputError(
                f"max_distance_m={self.max_distance_m} must be above 0, and needs pair=nearest"
            )


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
    report: Report = silent,
) -> GeoDataset:
    """Convert a folder of images that two CSV files with a header list; images are referenced where they are.

    Paths are relative to the source, or absolute. `pair="nearest"`: a query's place is the tile nearest on the
    great circle, within its own split when there is a split column (a `gallery` tile is never one);
    queries farther than `max_distance_m` are left out. `pair="key"`: equal keys are one place, and coordinates
    may be empty. Without a split column the easternmost `test_fraction` of the places is test, a strip, since
    a random draw would leave test places beside train places. Columns named by an option are wanted in both
    files, headings (degrees) in the queries alone. `name` is the source folder's name unless given. Raises
    InputError with file and line for missing columns, bad values and repeated ids, for missing images when
    `strict`, and for a target that holds a data set.
    """
    options = _Options(
        pair,
        path_column,
        lat_column,
        lon_column,
        key_column,
        max_distance_m,
        split_column,
        test_fraction,
        region_column,
        heading_column,
        id_column,
    )
    target = files.absolute(target)
    refuse_existing(target)
    source_folder = SourceFolder(source, report)
    tiles, photos = (
        _read(source_folder, references, "references", options),
        _read(source_folder, queries, "queries", options),
    )
    if pair == "key":
        tiles, photos = _pair_by_key(source_folder, tiles, photos)
    else:
        tiles, photos = _pair_nearest(source_folder, tiles, photos, max_distance_m)
    if split_column is None:
        tiles, photos = _split_by_strip(tiles, photos, test_fraction)
    source_folder.prefetch(entry.path.rpartition("/")[0] for entry in [*tiles, *photos])
    return source_folder.write(
        target,
        [_row(source_folder, tile) for tile in tiles if source_folder.image(tile.path)],
        [_row(source_folder, photo) for photo in photos if source_folder.image(photo.path)],
        name=name or source_folder.uri.rstrip("/").rpartition("/")[2] or "folder",
        views=VIEWS,
        strict=strict,
    )


def eastern_strip(lon: Floats64, fraction: float) -> Bools:
    """Which of lon[N] are the easternmost share; equal longitudes stay together (the share is the nearest)."""
    values, counts = np.unique(lon, return_counts=True)
    num_east = np.append(
        np.cumsum(counts[::-1])[::-1], 0
    )  # points at each value or east of it; and none
    cut = int(np.argmin(np.abs(num_east - fraction * len(lon))))
    return np.asarray(lon >= np.append(values, np.inf)[cut])


@dataclass(frozen=True)
class _Entry:
    """A line of a CSV file; split is empty until it is known, place_id is -1 until then."""

    at: str  # file and line
    id: int
    path: str
    lat: float | None
    lon: float | None
    key: str
    split: str
    region: str | None
    heading: float | None
    place_id: int = -1


def _row(source_folder: SourceFolder, entry: _Entry) -> Row:
    return Row(
        id=entry.id,
        place_id=entry.place_id,
        uri=source_folder.join(entry.path),
        split=entry.split,
        lat=entry.lat,
        lon=entry.lon,
        region=entry.region,
        source_id=entry.path,
        heading_deg=entry.heading,
    )


def _read(source_folder: SourceFolder, name: str, view: View, options: _Options) -> list[_Entry]:
    """All lines of a CSV file, checked."""
    reader = csv.reader(io.StringIO(source_folder.read_text(name), newline=""), strict=True)
    uri, entries = source_folder.join(name), list[_Entry]()
    columns: _Columns | None = None
    try:
        for fields in reader:
            at = f"{uri}, line {reader.line_num}"
            if not any(field.strip() for field in fields):
                continue
            if columns is None:
                columns = _Columns.find(at, [field.strip() for field in fields], view, options)
            else:
                entries.append(columns.entry(at, fields, len(entries)))
    except csv.Error as error:
        raise InputError(f"{uri}, line {reader.line_num}: not CSV: {error}") from error
    if columns is None or not entries:
        raise InputError(
            f"{uri}, line {reader.line_num + 1}: the file ends without a row; list the {view} in it"
        )
    if "lat" not in columns.index:
        source_folder.note(
            f"{uri} has no columns {options.lat_column} and {options.lon_column}: coordinates are null"
        )
    seen: dict[int, str] = {}
    for entry in entries:
        if entry.id in seen:
            raise InputError(
                f"{entry.at}: id {entry.id} stands already at {seen[entry.id]}; give each row its own"
            )
        seen[entry.id] = entry.at
    return entries


@dataclass(frozen=True)
class _Columns:
    """Where the values stand in a line, and how they are read."""

    names: list[str]
    index: dict[str, int]  # of what has a column in this file
    view: View
    located: bool  # coordinates may not be empty

    @classmethod
    def find(cls, at: str, names: list[str], view: View, options: _Options) -> _Columns:
        wanted = {"path": options.path_column, "lat": options.lat_column, "lon": options.lon_column}
        optional = {
            "split": options.split_column,
            "region": options.region_column,
            "id": options.id_column,
        }
        wanted |= {what: name for what, name in optional.items() if name is not None}
        if options.pair == "key":
            wanted["key"] = options.key_column
            if (options.lat_column, options.lon_column) == ("lat", "lon") and not {
                "lat",
                "lon",
            }.intersection(names):
                del wanted["lat"], wanted["lon"]  # nobody asked for them
        if options.heading_column is not None and view == "queries":
            wanted["heading"] = options.heading_column
        for what, name in wanted.items():
            if name not in names:
                close = [
                    n for n in names if n.casefold().startswith(name.casefold())
                ]  # Lat, latitude
                close = close or difflib.get_close_matches(name, names, 1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise InputError(
                    f"{at}: no column {name!r}{hint}; columns: {', '.join(names)}; name it with {what}_column"
                )
        return cls(
            names,
            {what: names.index(name) for what, name in wanted.items()},
            view,
            options.pair == "nearest",
        )

    def entry(self, at: str, fields: Sequence[str], number: int) -> _Entry:
        """One line; `number` is its id when there is no column of ids."""
        if len(fields) != len(self.names):
            raise InputError(f"{at} has {len(fields)} fields, but the header has {len(self.names)}")
        values = {what: fields[column].strip() for what, column in self.index.items()}
        for what in ("path", "key", "id"):
            if values.get(what) == "":
                raise InputError(f"{at}: {self.name(what)} is empty; give every row one")
        lat, lon = self._position(at, values)
        split = values.get("split", "")
        if "split" in values and split not in SPLITS[self.view]:
            raise InputError(
                f"{at}: {self.name('split')}={split!r} is none of {', '.join(SPLITS[self.view])}"
            )
        identity = values.get("id", str(number))
        if not is_number(identity):
            raise InputError(
                f"{at}: {self.name('id')}={identity!r} is not a whole number from 0 on"
            )
        heading = self._number(at, "heading", values.get("heading", ""))
        if heading is not None and not abs(heading) <= 360:
            raise InputError(
                f"{at}: {self.name('heading')}={heading} is not within -360..360; or leave it empty"
            )
        region = values.get("region") or None
        return _Entry(
            at,
            int(identity),
            values["path"],
            lat,
            lon,
            values.get("key", ""),
            split,
            region,
            heading,
        )

    def name(self, what: str) -> str:
        """The user's name of a column."""
        return self.names[self.index[what]]

    def _number(self, at: str, what: str, text: str) -> float | None:
        if not text:
            return None
        try:
            return float(text)
        except ValueError as error:
            raise InputError(f"{at}: {self.name(what)}={text!r} is not a number") from error

    def _position(self, at: str, values: dict[str, str]) -> tuple[float | None, float | None]:
        lat, lon = (self._number(at, what, values.get(what, "")) for what in ("lat", "lon"))
        if lat is None or lon is None:
            if self.located:
                raise InputError(
                    f"{at}: coordinates are empty; fill them in, or pair by key (pair=key)"
                )
            if (lat, lon) != (None, None):
                raise InputError(
                    f"{at}: {self.name('lat')} and {self.name('lon')} are given both or not at all"
                )
        elif not valid_position(lat, lon):
            raise InputError(f"{at}: {lat}, {lon} is not within -90..90 and -180..180 degrees")
        return lat, lon


def _pair_by_key(
    source_folder: SourceFolder, tiles: list[_Entry], photos: list[_Entry]
) -> tuple[list[_Entry], list[_Entry]]:
    """Places numbered in the order in which the tiles' keys first appear; photos of other keys are left out."""
    places: dict[str, int] = {}
    for tile in tiles:
        places.setdefault(tile.key, len(places))
    matched = [
        replace(photo, place_id=places[photo.key]) for photo in photos if photo.key in places
    ]
    if len(matched) < len(photos):
        first = next(photo for photo in photos if photo.key not in places)
        source_folder.note(
            f"queries left out, as no reference has their key: {len(photos) - len(matched):,},"
            f" the first {first.key!r} at {first.at}"
        )
    return [replace(tile, place_id=places[tile.key]) for tile in tiles], matched


def _pair_nearest(
    source_folder: SourceFolder,
    tiles: list[_Entry],
    photos: list[_Entry],
    max_distance_m: float | None,
) -> tuple[list[_Entry], list[_Entry]]:
    """Places are tiles, by number; each photo goes to the nearest of its split, missing images or not."""
    place_of = np.full(len(photos), -1, dtype=np.int64)
    tile_splits, photo_splits = (
        np.array([entry.split for entry in entries]) for entries in (tiles, photos)
    )
    at_tiles, at_photos = _positions(tiles), _positions(photos)
    for split in np.unique(photo_splits):
        candidates, asking = (
            np.flatnonzero(tile_splits == split),
            np.flatnonzero(photo_splits == split),
        )
        if not len(candidates):
            raise InputError(
                f"{photos[asking[0]].at}: no reference has the split {str(split)!r}, so none can be its place"
            )
        tree = cKDTree(unit_sphere(*at_tiles[:, candidates]))
        place_of[asking] = candidates[tree.query(unit_sphere(*at_photos[:, asking]))[1]]
    metres = metres_between(*at_photos, *at_tiles[:, place_of])
    near = np.full(len(photos), True) if max_distance_m is None else metres <= max_distance_m
    if not near.all():
        source_folder.note(
            f"queries left out, as no tile is within {max_distance_m:g} m: {int((~near).sum()):,}"
        )
    kept = [replace(photos[i], place_id=int(place_of[i])) for i in np.flatnonzero(near)]
    return [replace(tile, place_id=number) for number, tile in enumerate(tiles)], kept


def _positions(entries: Sequence[_Entry]) -> Floats64:
    """Latitudes and longitudes [2, N] in degrees."""
    return np.array(
        [[entry.lat for entry in entries], [entry.lon for entry in entries]], dtype=np.float64
    )


def _split_by_strip(
    tiles: list[_Entry], photos: list[_Entry], fraction: float
) -> tuple[list[_Entry], list[_Entry]]:
    """Test is the easternmost share of the places, each at its tiles' mean longitude; photos follow their place."""
    longitudes: dict[int, list[float]] = {}
    for tile in tiles:
        if tile.lon is None:
            raise InputError(
                f"{tile.at}: without coordinates there is no eastern strip to test on; give split_column"
            )
        longitudes.setdefault(tile.place_id, []).append(tile.lon)
    east = eastern_strip(np.array([np.mean(lon) for lon in longitudes.values()]), fraction)
    split = {
        place: "test" if tested else "train" for place, tested in zip(longitudes, east, strict=True)
    }
    return (
        [replace(tile, split=split[tile.place_id]) for tile in tiles],
        [replace(photo, split=split[photo.place_id]) for photo in photos],
    )
