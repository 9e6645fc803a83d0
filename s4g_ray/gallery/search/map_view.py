"""Choose the tiles of a gallery that a map view shows: few enough for a browser."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.sphere import METRES_A_DEGREE, half_sides, unroll_longitudes
from s4g_ray.errors import InputError

MAX_TILES = 2000  # images that a browser loads for one view
ROWS_PER_SIZE = 8  # tiles whose latitudes differ by less than an eighth of their size are one row
SIZES_PER_DOUBLING = 8  # tiles whose sizes differ by less than about 9 % are covered together
TOUCHING = 1.02  # of the size: tiles this far apart leave a gap of a pixel at most
UNCOVERED = 0.75  # of the size: a tile farther than this from all that are shown is shown too


class MapView:
    """The tiles that a map shows: lat[N], lon[N] in degrees, size_m[N] in metres.

    Of overlapping tiles, few enough to cover the ground are chosen once, here, so that a moved
    view keeps the tiles that it had. Tiles of unknown size (NaN) are never shown.
    """

    def __init__(self, lat: Floats64, lon: Floats64, size_m: Floats64) -> None:
        self._lat = np.asarray(lat, np.float64)
        self._lon = np.asarray(lon, np.float64)
        self._size_m = np.asarray(size_m, np.float64)
        known = np.flatnonzero(self._size_m > 0)
        like = np.round(np.log2(self._size_m[known]) * SIZES_PER_DOUBLING)
        chosen = [
            _cover(self._lat, self._lon, self._size_m, known[like == size])
            for size in np.unique(like)[::-1]
        ]
        self._rows = np.concatenate([np.empty(0, np.int64), *chosen])
        self._half_lat, self._half_lon = half_sides(self._lat[self._rows], self._size_m[self._rows])

    def rows(self, bounds: tuple[float, float, float, float], limit: int) -> Ints:
        """Return the rows of the arrays whose tiles meet (west, south, east, north) in degrees.

        The bounds may cross the antimeridian, with west > east or longitudes beyond 180. Large
        tiles come first, so that smaller ones are drawn over them. When there are more than
        `limit`, none is returned: tiles of a few pixels show nothing.

        Raises InputError for bounds that are not finite, or a limit outside 1..MAX_TILES.
        """
        west, south, east, north = bounds
        if not np.isfinite(bounds).all() or south > north:
            raise InputError(f"bounds={bounds}: give finite degrees, west,south,east,north")
        if not 1 <= limit <= MAX_TILES:
            raise InputError(f"limit={limit}: give 1 to {MAX_TILES} tiles")
        lat = self._lat[self._rows]
        width = min(east - west + 360 * (east < west), 360.0)
        # 0 where a tile touches the west border from outside
        from_west = np.mod(self._lon[self._rows] - west + self._half_lon, 360)
        in_width = from_west <= width + 2 * self._half_lon
        in_height = (lat >= south - self._half_lat) & (lat <= north + self._half_lat)
        rows = self._rows[in_width & in_height]
        return rows if len(rows) <= limit else np.empty(0, np.int64)


def _cover(lat: Floats64, lon: Floats64, size_m: Floats64, rows: Ints) -> Ints:
    """Return those of `rows`, tiles of about one size, that cover their ground."""
    size = float(size_m[rows].min()) / METRES_A_DEGREE
    # from the middle: that of Greenwich, degrees shortened by their own latitude would lie askew
    eastwards = unroll_longitudes(lon[rows])
    lon = lon.copy()
    lon[rows] = eastwards - (eastwards.min() + eastwards.max()) / 2
    order = rows[np.lexsort((lon[rows], lat[rows]))]
    starts = np.flatnonzero(np.diff(lat[order], prepend=-np.inf) > size / ROWS_PER_SIZE)
    ends = np.append(starts[1:], len(order))
    chosen = np.zeros(len(order), bool)
    for band in np.flatnonzero(_spread(lat[order[starts]], size)):
        first, last = int(starts[band]), int(ends[band])
        in_band = order[first:last]
        by_lon = np.argsort(lon[in_band], kind="stable")
        step = size / max(float(np.cos(np.radians(lat[in_band[0]]))), 1e-6)
        chosen[first + by_lon[_spread(lon[in_band[by_lon]], step)]] = True
    shrink = np.maximum(np.cos(np.radians(lat[order])), 1e-6)
    points = np.stack([lat[order], lon[order] * shrink], axis=1)
    away, _ = cKDTree(points[chosen]).query(points, p=np.inf)
    return order[chosen | (away > UNCOVERED * size)]


def _spread(ascending: Floats64, size: float) -> Bools:
    """Choose, of intervals `size` wide about centres, few that cover the same line."""
    chosen = np.zeros(len(ascending), bool)
    row = 0
    while row < len(ascending):
        chosen[row] = True
        reach = ascending[row] + size * TOUCHING
        farthest = int(np.searchsorted(ascending, reach, side="right")) - 1
        row = max(farthest, row + 1)
    return chosen
