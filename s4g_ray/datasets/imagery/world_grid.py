"""Define WorldGrid: cells of equal ground size over the Earth, with ids that never change.

A grid follows from the side of a tile and the overlap alone. Rows run along parallels, at equal
distances along the meridian of the WGS 84 ellipsoid; the columns of a row are at equal distances
along its parallel. Both distances are the step of the grid, or less by what it takes to make the
number of rows and columns whole.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.area import Area
from s4g_ray.errors import InputError

Bounds = tuple[float, float, float, float]  # west, south, east, north in degrees; west > east: 180
SEMI_MAJOR_M = 6_378_137.0  # WGS 84
FLATTENING = 1 / 298.257223563
_ECCENTRICITY_2 = FLATTENING * (2 - FLATTENING)
_N = FLATTENING / (2 - FLATTENING)  # third flattening
# radius of the sphere whose meridians are as long
RECTIFYING_M = SEMI_MAJOR_M / (1 + _N) * (1 + _N**2 / 4 + _N**4 / 64)
MERIDIAN_M = np.pi * RECTIFYING_M  # from pole to pole
EQUATOR_M = 2 * np.pi * SEMI_MAJOR_M
MIN_STEP_M = 0.05
MAX_SIZE_M = 2_000_000.0
WORLD: Bounds = (-180.0, -90.0, 180.0, 90.0)
MAX_ID = 2**63


@dataclass(frozen=True, eq=False)
class GridCells:
    """Cells of one grid: ids[N], and their centres lat[N], lon[N] in degrees of WGS 84."""

    ids: Ints
    lat: Floats64
    lon: Floats64
    size_m: float  # side of a cell's square of ground

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.ids)

    def take(self, rows: ArrayLike | slice) -> GridCells:
        """Return some of the cells, by row numbers, a mask or a slice."""
        chosen = rows if isinstance(rows, slice) else np.asarray(rows)
        return GridCells(self.ids[chosen], self.lat[chosen], self.lon[chosen], self.size_m)


@dataclass(frozen=True)
class WorldGrid:
    """A grid of square cells of size_m metres, `overlap` of a side shared by neighbors.

    A cell's id is a function of size_m, overlap, row and column alone, 0 or larger. Ids of
    different grids differ too (the numbers of a grid start at a hash of size_m and overlap;
    check_grids tells the rare pair of grids that meet). Raises InputError.
    """

    size_m: float
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise InputError(f"--overlap {self.overlap:g} must be 0 or more, and below 1")
        if not self.size_m <= MAX_SIZE_M or not self.step_m >= MIN_STEP_M:
            raise InputError(
                f"--size-m {self.size_m:g} with --overlap {self.overlap:g} gives cells"
                f" {self.step_m:g} m apart; choose at least {MIN_STEP_M} m apart, and --size-m of"
                f" at most {MAX_SIZE_M:g}"
            )

    @property
    def step_m(self) -> float:
        """Return the distance between the centres of neighbors."""
        return float(self.size_m * (1 - self.overlap))

    @cached_property
    def num_rows(self) -> int:
        """Return the number of rows from the south pole to the north pole."""
        return _count(MERIDIAN_M / self.step_m)

    @cached_property
    def max_columns(self) -> int:
        """Return a number of columns that no row exceeds."""
        return _count(EQUATOR_M / self.step_m) + 1

    @cached_property
    def first_id(self) -> int:
        """Return the id of row 0, column 0."""
        text = f"s4g-grid|{float(self.size_m)!r}|{float(self.overlap)!r}"
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8], "big") % (MAX_ID - self.num_rows * self.max_columns)

    def row_lat(self, rows: ArrayLike) -> Floats64:
        """Return the latitude of the centres of rows[N]."""
        share = (np.asarray(rows, np.float64) + 0.5) / self.num_rows - 0.5
        return np.degrees(_latitude_of(np.pi * share))

    def num_columns(self, rows: ArrayLike) -> Ints:
        """Return the number of columns of each of rows[N]."""
        lat = np.radians(self.row_lat(rows))
        radius = np.cos(lat) / np.sqrt(1 - _ECCENTRICITY_2 * np.sin(lat) ** 2)
        counts = np.ceil(EQUATOR_M * radius / self.step_m - 1e-9)
        return np.maximum(counts, 1).astype(np.int64)

    def cells_of(self, rows: Ints, columns: Ints) -> GridCells:
        """Return the cells at rows[N] and columns[N]."""
        counts = self.num_columns(rows)
        lon = (columns + 0.5) * 360 / counts - 180
        ids = self.first_id + rows * self.max_columns + columns
        return GridCells(ids, self.row_lat(rows), lon, self.size_m)

    def row_and_column(self, ids: ArrayLike) -> tuple[Ints, Ints]:
        """Return rows[N] and columns[N] of cells. Raises InputError for ids of other grids."""
        offsets = np.asarray(ids, np.int64) - self.first_id
        rows, columns = np.divmod(offsets, self.max_columns)
        inside = (offsets >= 0) & (rows < self.num_rows)
        inside[inside] = columns[inside] < self.num_columns(rows[inside])
        if not inside.all():
            wrong = np.asarray(ids)[~inside][0]
            raise InputError(f"{wrong} is no cell of the grid of {self.size_m:g} m")
        return rows, columns

    def cells_in(self, area: Area | None = None, bounds: Bounds | None = None) -> GridCells:
        """Return the cells whose centres lie in an area and within bounds, by row, eastwards.

        bounds: west, south, east, north in degrees; they cross the antimeridian where west is
        larger than east, or east larger than 180. Bounds are half open: two that adjoin share no
        cell. Without bounds those of the area are taken, without both the whole Earth.
        """
        if bounds is None:
            bounds = WORLD if area is None else area.extent
        rows, first, counts = self._rows_within(bounds)
        row_of = np.repeat(rows, counts)
        starts = np.cumsum(counts) - counts
        columns = np.arange(len(row_of)) - np.repeat(starts - first, counts)
        cells = self.cells_of(row_of, columns % self.num_columns(row_of))
        return cells if area is None else cells.take(area.contains(cells.lat, cells.lon))

    def count_within(self, bounds: Bounds) -> int:
        """Return how many cells have their centre within bounds, without listing them."""
        return int(self._rows_within(bounds)[2].sum())

    def _rows_within(self, bounds: Bounds) -> tuple[Ints, Ints, Ints]:
        """Return the rows[R] within bounds, the first column of each, and how many follow."""
        west, south, east, north = bounds
        width = 360.0 if east - west >= 360 else (east - west) % 360
        rows = np.arange(self._first_row(south), self._first_row(north))
        if north >= 90:
            rows = np.arange(self._first_row(south), self.num_rows)
        columns = self.num_columns(rows)
        # the first column whose centre is at the meridian or to the east of it
        start = (west + 180) % 360
        first = np.ceil(start / 360 * columns - 0.5).astype(np.int64)
        end = np.ceil((start + width) / 360 * columns - 0.5).astype(np.int64)
        return rows, first, np.minimum(end - first, columns)

    def _first_row(self, lat: float) -> int:
        """Return the first row whose centre is at a latitude or to the north of it."""
        share = _rectify(np.radians(lat)) / np.pi + 0.5
        return int(np.ceil(np.clip(share * self.num_rows - 0.5, 0, self.num_rows)))


def check_grids(grids: Iterable[WorldGrid]) -> None:
    """Raise InputError for grids whose ids are not apart: the same one twice, or by chance."""
    ordered = sorted(grids, key=lambda grid: grid.first_id)
    for lower, upper in itertools.pairwise(ordered):
        if lower.first_id + lower.num_rows * lower.max_columns > upper.first_id:
            raise InputError(
                f"sizes of {lower.size_m:g} m and {upper.size_m:g} m with overlaps of"
                f" {lower.overlap:g} and {upper.overlap:g} share ids of cells; change one of them"
            )


def split_blocks(grid: WorldGrid, cells: GridCells, side: int = 16) -> Iterator[GridCells]:
    """Divide cells into compact blocks of at most side * side cells, always in the same way.

    A block holds cells of `side` consecutive rows of the grid, from west to east, and less where
    the next cell lies a quarter of the Earth or more to the east.
    """
    if not len(cells):
        return
    rows, _ = grid.row_and_column(cells.ids)
    order = np.lexsort((rows, cells.lon, rows // side))
    band = (rows // side)[order]
    lon = cells.lon[order]
    cuts = np.flatnonzero((np.diff(band) != 0) | (np.diff(lon) > 90)) + 1
    for part in np.split(order, cuts):
        for start in range(0, len(part), side * side):
            yield cells.take(np.sort(part[start : start + side * side]))


def _count(share: float) -> int:
    """Return the whole number of steps that are needed; rounding errors add none."""
    return max(1, int(np.ceil(share - 1e-9)))


def _rectify(phi: ArrayLike) -> Floats64:
    """Geodetic latitude -> rectifying latitude: meridian distance / RECTIFYING_M (radians)."""
    lat = np.asarray(phi, np.float64)
    mu = lat - (3 * _N / 2 - 9 * _N**3 / 16) * np.sin(2 * lat)
    mu += (15 * _N**2 / 16 - 15 * _N**4 / 32) * np.sin(4 * lat)
    mu += -35 * _N**3 / 48 * np.sin(6 * lat) + 315 * _N**4 / 512 * np.sin(8 * lat)
    return np.asarray(mu)


def _latitude_of(mu: ArrayLike) -> Floats64:
    """Rectifying latitude -> geodetic latitude (radians); the series of Krueger and Snyder 3-26."""
    arc = np.asarray(mu, np.float64)
    phi = arc + (3 * _N / 2 - 27 * _N**3 / 32) * np.sin(2 * arc)
    phi += (21 * _N**2 / 16 - 55 * _N**4 / 32) * np.sin(4 * arc)
    phi += 151 * _N**3 / 96 * np.sin(6 * arc) + 1097 * _N**4 / 512 * np.sin(8 * arc)
    return np.asarray(phi)
