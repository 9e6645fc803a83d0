"""Read single tiles of web mercator pyramids: MBTiles, PMTiles, folders Z/X/Y.EXT.

Tiles are counted from the north west, as in an XYZ folder; MBTiles counts rows from the south,
which is turned around here.
"""

from __future__ import annotations

import bisect
import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import numpy as np

from s4g_ray.errors import InputError, first_line
from s4g_ray.storage import files

IMAGE_ENDS = ("png", "jpg", "jpeg", "webp", "avif")
MAX_ZOOM = 30
MAX_DEPTH = 3  # directories of PMTiles below the first
DIRECTORY_BYTES = 1 << 20  # ranges of PMTiles up to this size may be directories: kept in memory


class Coverage(NamedTuple):
    """The zooms of a pyramid, ascending, and the tiles of the last one: both ends included.

    right is 2**zoom or more where the tiles cross the antimeridian.
    """

    zooms: tuple[int, ...]
    left: int
    top: int
    right: int
    bottom: int


class TileStore(Protocol):
    """Tiles by zoom, column and row."""

    def coverage(self) -> Coverage:
        """Return which tiles there are."""

    def find_tile(self, zoom: int) -> tuple[int, int] | None:
        """Return column and row of any one tile of a zoom, None where there is none."""

    def read(self, zoom: int, column: int, row: int) -> bytes | None:
        """Return the bytes of a tile, None where there is none."""


def open_store(uri: str) -> TileStore:
    """Open the store of a path or URI, by its end. Raises InputError."""
    if uri.lower().endswith(".mbtiles"):
        return MBTiles(uri)
    if uri.lower().endswith(".pmtiles"):
        return PMTiles(uri)
    return TileFolder(uri)


def is_tile_folder(uri: str, names: Sequence[str]) -> bool:
    """Return whether a folder with these names holds zooms, which hold columns of tiles."""
    zooms = [name for name in names if _is_number(name) and int(name) <= MAX_ZOOM]
    return bool(zooms) and any(map(_is_number, files.list_names(files.join(uri, zooms[-1]))))


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _vector_error(uri: str, kind: str) -> InputError:
    return InputError(f"{uri} holds tiles of type {kind}, not images; give raster tiles")


class MBTiles:
    """Tiles in an SQLite file (MBTiles 1.3)."""

    def __init__(self, uri: str) -> None:
        if not files.is_local(uri):
            raise InputError(f"{uri}: MBTiles are read from a disk; copy the file there first")
        self._uri = uri
        self._file = sqlite3.connect(
            f"file:{quote(uri)}?mode=ro", uri=True, check_same_thread=False
        )

    def _select(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._file.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise InputError(f"{self._uri} cannot be read as MBTiles: {error}") from error

    def coverage(self) -> Coverage:
        """Return which tiles there are. Raises InputError for vector tiles and an empty file."""
        kind = self._select("SELECT value FROM metadata WHERE name = 'format'")
        if kind and kind[0][0].lower() not in IMAGE_ENDS:
            raise _vector_error(self._uri, kind[0][0])
        zooms = [row[0] for row in self._select("SELECT DISTINCT zoom_level FROM tiles ORDER BY 1")]
        if not zooms:
            raise InputError(f"{self._uri} holds no tiles")
        ((south, north),) = self._select(
            "SELECT MIN(tile_row), MAX(tile_row) FROM tiles WHERE zoom_level = ?", zooms[-1]
        )
        columns = self._select(
            "SELECT DISTINCT tile_column FROM tiles WHERE zoom_level = ? ORDER BY 1", zooms[-1]
        )
        left, right = span_columns([row[0] for row in columns], zooms[-1])
        last = 2 ** zooms[-1] - 1
        return Coverage(tuple(zooms), left, last - north, right, last - south)

    def find_tile(self, zoom: int) -> tuple[int, int] | None:
        """Return column and row of some tile of a zoom, None where there is none."""
        found = self._select(
            "SELECT tile_column, tile_row FROM tiles WHERE zoom_level = ? LIMIT 1", zoom
        )
        return (found[0][0], 2**zoom - 1 - found[0][1]) if found else None

    def read(self, zoom: int, column: int, row: int) -> bytes | None:
        """Return the bytes of a tile, None where there is none."""
        found = self._select(
            "SELECT tile_data FROM tiles WHERE zoom_level = ? AND tile_column = ? AND tile_row = ?",
            zoom,
            column,
            2**zoom - 1 - row,
        )
        return bytes(found[0][0]) if found else None


class PMTiles:
    """Tiles in one file of version 3, read in ranges."""

    def __init__(self, uri: str) -> None:
        try:
            from pmtiles import reader
        except ModuleNotFoundError as error:
            raise InputError(
                f"{uri}: PMTiles need a package: pip install 's4g-ray[imagery]'"
            ) from error
        self._uri = uri
        self._directory = lru_cache(64)(self._range)
        make_reader: Any = reader.Reader
        self._reader = make_reader(self._read_range)

    def _range(self, offset: int, length: int) -> bytes:
        return files.read_available(self._uri, offset, length)

    def _read_range(self, offset: int, length: int) -> bytes:
        return (self._directory if length < DIRECTORY_BYTES else self._range)(offset, length)

    def coverage(self) -> Coverage:
        """Return which tiles there are, by the header. Raises InputError."""
        from pmtiles.tile import MagicNumberNotFound, SpecVersionUnsupported, TileType

        try:
            header = self._reader.header()
        except FileNotFoundError as error:
            raise InputError(f"{self._uri} does not exist") from error
        except (MagicNumberNotFound, SpecVersionUnsupported, ValueError, IndexError) as error:
            reason = first_line(error)
            raise InputError(f"{self._uri} cannot be read as PMTiles 3: {reason}") from error
        if header["tile_type"] in (TileType.MVT, TileType.MLT):
            raise _vector_error(self._uri, header["tile_type"].name)
        zooms = tuple(range(header["min_zoom"], header["max_zoom"] + 1))
        west, south, east, north = (
            header[f"{name}_e7"] / 1e7 for name in ("min_lon", "min_lat", "max_lon", "max_lat")
        )
        left, top = tile_at(zooms[-1], west, north)
        right, bottom = tile_at(zooms[-1], east, south, before=True)
        if east < west:
            right += 2 ** zooms[-1]
        return Coverage(zooms, left, top, max(right, left), max(bottom, top))

    def find_tile(self, zoom: int) -> tuple[int, int] | None:
        """Return column and row of some tile of a zoom, None where there is none."""
        from pmtiles.tile import tileid_to_zxy, zxy_to_tileid

        header = self._reader.header()
        first = zxy_to_tileid(zoom, 0, 0)
        found = self._find_from(first, header["root_offset"], header["root_length"])
        if found is None or found >= zxy_to_tileid(zoom + 1, 0, 0):
            return None
        _, column, row = tileid_to_zxy(found)
        return column, row

    def _find_from(self, first: int, start: int, length: int, depth: int = 0) -> int | None:
        """Return the smallest id of a tile that is `first` or more, below a directory."""
        from pmtiles.tile import deserialize_directory

        entries = deserialize_directory(self._read_range(start, length))
        before = bisect.bisect_right(entries, first, key=lambda entry: entry.tile_id) - 1
        for entry in entries[max(before, 0) :]:
            if entry.run_length:
                if entry.tile_id + entry.run_length > first:
                    return max(entry.tile_id, first)
            elif depth < MAX_DEPTH:
                leaf = self._reader.header()["leaf_directory_offset"] + entry.offset
                found = self._find_from(first, leaf, entry.length, depth + 1)
                if found is not None:
                    return found
        return None

    def read(self, zoom: int, column: int, row: int) -> bytes | None:
        """Return the bytes of a tile, None where there is none."""
        found = self._reader.get(zoom, column, row)
        return bytes(found) if found else None


class TileFolder:
    """Tiles as files Z/X/Y.EXT, local or in an object store."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._names = lru_cache(256)(self._list)

    def _list(self, zoom: int, column: int) -> dict[int, str]:
        """Return the file name of each row of a column."""
        found = {}
        for name in files.list_names(files.join(self._uri, str(zoom), str(column))):
            row, _, end = name.partition(".")
            if _is_number(row) and end.lower() in IMAGE_ENDS:
                found[int(row)] = name
        return found

    def coverage(self) -> Coverage:
        """Return which tiles there are, by listing folders. Raises InputError."""
        zooms = sorted(int(name) for name in files.list_names(self._uri) if _is_number(name))
        for zoom in reversed(zooms):
            names = files.list_names(files.join(self._uri, str(zoom)))
            columns = sorted(int(name) for name in names if _is_number(name))
            rows = {row for column in columns for row in self._list(zoom, column)}
            if rows:
                kept = tuple(z for z in zooms if z <= zoom)
                left, right = span_columns(columns, zoom)
                return Coverage(kept, left, min(rows), right, max(rows))
        raise InputError(f"{self._uri} holds no tiles Z/X/Y.{'/'.join(IMAGE_ENDS)}")

    def find_tile(self, zoom: int) -> tuple[int, int] | None:
        """Return column and row of some tile of a zoom, None where there is none."""
        for name in files.list_names(files.join(self._uri, str(zoom))):
            rows = self._list(zoom, int(name)) if _is_number(name) else {}
            if rows:
                return int(name), min(rows)
        return None

    def read(self, zoom: int, column: int, row: int) -> bytes | None:
        """Return the bytes of a tile, None where there is none."""
        name = self._names(zoom, column).get(row)
        if name is None:
            return None
        return files.read_bytes(files.join(self._uri, str(zoom), str(column), name))


def span_columns(columns: Sequence[int], zoom: int) -> tuple[int, int]:
    """Return the ends of the smallest span of ascending columns around the Earth, both included.

    The second is 2**zoom or more where the span crosses the antimeridian.
    """
    count = 2**zoom
    gaps = np.diff(columns)
    if not len(gaps) or gaps.max() <= columns[0] + count - columns[-1]:
        return columns[0], columns[-1]
    widest = int(gaps.argmax())
    return columns[widest + 1], columns[widest] + count


def tile_at(zoom: int, lon: float, lat: float, *, before: bool = False) -> tuple[int, int]:
    """Return column and row of the tile at a point; `before`: of one that ends there, if it is an
    edge."""
    count = 2**zoom
    phi = np.radians(np.clip(lat, -85.0511287, 85.0511287))
    x = (lon + 180) / 360 * count
    y = (1 - np.arcsinh(np.tan(phi)) / np.pi) / 2 * count
    slack = 1e-4 * (-1 if before else 1)  # bounds are rounded to 1e-7 degrees
    column, row = np.floor([x + slack, y + slack])
    return int(np.clip(column, 0, count - 1)), int(np.clip(row, 0, count - 1))
