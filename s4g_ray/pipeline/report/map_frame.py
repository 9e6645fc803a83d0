"""Define MapFrame: a rectangle of ground as a map shows it, with its scale and its graticule.

North is up. Degrees of longitude are shortened as at the frame's middle, where its scale holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.sphere import (
    METRES_A_DEGREE,
    half_sides,
    span_longitudes,
    unit_sphere,
    wrap_longitudes,
)

MARGIN = 0.06  # of the extent, on each side
SMALLEST_M = 200.0  # half a side
ASPECT = (0.45, 1.6)  # height by width
STEPS = (1.0, 2.0, 5.0)  # of scale bars and graticules, times a power of ten
DEGREES = (10.0, 15.0, 30.0, 45.0)  # steps of wide graticules
CELLS = 8  # along an extent, at most: areas are apart where a cell between them is empty
MAX_DEPTH = 3  # of areas within areas


@dataclass(frozen=True)
class MapFrame:
    """The middle, degrees, and half the sides, metres."""

    lat: float
    lon: float
    half_width_m: float
    half_height_m: float

    @classmethod
    def around(cls, lat: Floats64, lon: Floats64) -> MapFrame:
        """Frame points in degrees, one or more, with a margin, in the proportions of a page."""
        west, east = span_longitudes(lon)
        width = (east - west) % 360
        middle = float(lat.min() + lat.max()) / 2
        center = float(wrap_longitudes(west + width / 2))
        scale = (0.5 + MARGIN) * METRES_A_DEGREE
        half_width = max(width * scale * _shrink(middle), SMALLEST_M)
        half_height = max(float(np.ptp(lat)) * scale, SMALLEST_M)
        half_height = max(half_height, ASPECT[0] * half_width)
        half_width = max(half_width, half_height / ASPECT[1])
        return cls(middle, center, half_width, half_height)

    @property
    def aspect(self) -> float:
        """The height by the width."""
        return self.half_height_m / self.half_width_m

    def to_plane(self, lat: Floats64, lon: Floats64) -> tuple[Floats64, Floats64]:
        """Return metres east and north of the middle, along the shorter way around the globe."""
        away = wrap_longitudes(np.asarray(lon, np.float64) - self.lon)
        x = away * METRES_A_DEGREE * _shrink(self.lat)
        return x, (np.asarray(lat, np.float64) - self.lat) * METRES_A_DEGREE

    def contains(self, lat: Floats64, lon: Floats64) -> Bools:
        """Return which points lie in the frame; unknown ones do not."""
        x, y = self.to_plane(lat, lon)
        inside = (np.abs(x) <= self.half_width_m) & (np.abs(y) <= self.half_height_m)
        return np.asarray(inside)

    def boxes(self, lat: Floats64, lon: Floats64, size_m: Floats64) -> Floats64:
        """Return the squares of ground as boxes[N, 4]: left, right, bottom, top, metres."""
        x, y = self.to_plane(lat, lon)
        half_lat, half_lon = half_sides(lat, size_m)
        half_x = half_lon * METRES_A_DEGREE * _shrink(self.lat)
        half_y = half_lat * METRES_A_DEGREE
        return np.stack([x - half_x, x + half_x, y - half_y, y + half_y], axis=1)

    def bar_m(self) -> float:
        """Return the length of the scale bar: a round number, at most a quarter of the width."""
        return round_down(self.half_width_m / 2)

    def meridians(self) -> tuple[Floats64, float]:
        """Return the longitudes of the graticule in the frame, within -180..180, and their step."""
        reach = min(self.half_width_m / METRES_A_DEGREE / _shrink(self.lat), 180.0)
        step = _degree_step(2 * reach)
        lines = _multiples(self.lon - reach, self.lon + reach, step)
        return np.unique(wrap_longitudes(lines)), step

    def parallels(self) -> tuple[Floats64, float]:
        """Return the latitudes of the graticule in the frame, and their step."""
        reach = self.half_height_m / METRES_A_DEGREE
        step = _degree_step(2 * reach)
        low = max(self.lat - reach, -90.0)
        high = min(self.lat + reach, 90.0)
        return _multiples(low, high, step), step


def _shrink(lat: float) -> float:
    return max(float(np.cos(np.radians(lat))), 1e-6)


def round_down(value: float) -> float:
    """Return the largest 1, 2 or 5 times a power of ten that is not above a value."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(max(step for step in STEPS if step * power <= value * (1 + 1e-9)) * power)


def _degree_step(span: float) -> float:
    """Return a step that divides a span of degrees into three to nine parts."""
    step = round_down(span / 3)
    if step < 10:
        return step
    return max(wide for wide in DEGREES if wide <= max(span / 3, DEGREES[0]))


def _multiples(low: float, high: float, step: float) -> Floats64:
    first = np.ceil(low / step - 1e-9)
    last = np.floor(high / step + 1e-9)
    return np.asarray(np.arange(first, last + 1) * step)


def format_degrees(value: float, step: float, marks: str) -> str:
    """Format degrees of a graticule; marks: `NS` or `EW`."""
    decimals = max(0, int(np.ceil(-np.log10(step) - 1e-9)))
    text = f"{abs(value):.{decimals}f}°"
    if float(f"{abs(value):.{decimals}f}") in (0.0, 180.0):
        return text
    return f"{text} {marks[0] if value > 0 else marks[1]}"


def split_areas(lat: Floats64, lon: Floats64, depth: int = 0) -> list[Ints]:
    """Split points, in degrees, into areas far apart -> their rows, the largest area first.

    Two areas are apart where an eighth of their common extent between them is empty, or more where
    points are few; what belongs to one area may be split again.
    """
    everything: Ints = np.arange(len(lat))
    xyz = unit_sphere(lat, lon)
    extent = float(np.ptp(xyz, axis=0).max()) if len(xyz) else 0.0
    if extent == 0.0 or depth == MAX_DEPTH:
        return [everything]
    num_cells = min(CELLS, int(np.sqrt(len(xyz)) / 2))
    cells, cell_of = np.unique(np.floor(xyz * num_cells / extent), axis=0, return_inverse=True)
    pairs = cKDTree(cells).query_pairs(1.8, output_type="ndarray")  # of cells that touch
    links = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(cells), len(cells)))
    count, label_of = connected_components(links, directed=False)
    if count == 1:
        return [everything]
    labels = label_of[cell_of.ravel()]
    areas = []
    for label in range(count):
        rows = np.flatnonzero(labels == label)
        areas += [rows[part] for part in split_areas(lat[rows], lon[rows], depth + 1)]
    return sorted(areas, key=len, reverse=True)
