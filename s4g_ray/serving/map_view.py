"""Choose the tiles of a gallery that a map view shows: few enough for a browser, no ground twice."""

from __future__ import annotations

import numpy as np

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.sphere import EARTH_RADIUS_M
from s4g_ray.errors import InputError

METRES_PER_DEGREE = EARTH_RADIUS_M * np.pi / 180
MAX_TILES = 1000  # images that a browser loads for one view


def tiles_in_view(
    lat: Floats64,
    lon: Floats64,
    size_m: Floats64,
    bounds: tuple[float, float, float, float],
    limit: int,
) -> Ints:
    """Return the rows of the tiles that cover a view: lat[N], lon[N], size_m[N] -> rows[M].

    `bounds` is (west, south, east, north) in degrees; it may cross the antimeridian, with west > east or
    with longitudes beyond 180. Overlapping tiles are thinned to about one for each square of their size.
    When more than `limit` would remain, none is returned: tiles of a few pixels show nothing.
    Large tiles come first, so that smaller ones are drawn over them. Tiles of unknown size are left out.

    Raises InputError for bounds that are not finite, or a limit outside 1..MAX_TILES.
    """
    west, south, east, north = bounds
    if not np.isfinite(bounds).all() or south > north:
        raise InputError(f"bounds={bounds}: give finite degrees, west,south,east,north")
    if not 1 <= limit <= MAX_TILES:
        raise InputError(f"limit={limit}: give 1 to {MAX_TILES} tiles")
    known = np.flatnonzero(size_m > 0)
    half_lat = size_m[known] / 2 / METRES_PER_DEGREE
    half_lon = half_lat / np.maximum(np.cos(np.radians(lat[known])), 1e-6)
    width = min(east - west + 360 * (east < west), 360.0)
    from_west = np.mod(lon[known] - west + half_lon, 360)  # 0 where a tile ends at the west border
    in_width = from_west <= width + 2 * half_lon
    in_height = (lat[known] >= south - half_lat) & (lat[known] <= north + half_lat)
    rows = known[in_width & in_height]
    rows = rows[_one_of_each_square(lat[rows], lon[rows], size_m[rows])]
    if len(rows) > limit:
        return np.empty(0, np.int64)
    return rows[np.argsort(-size_m[rows], kind="stable")]


def _one_of_each_square(lat: Floats64, lon: Floats64, size_m: Floats64) -> Ints:
    """Return the row nearest to the middle of each square of a grid as wide as the tiles.

    The grid depends on a tile's size and latitude only, so a moved view keeps the tiles it had.
    """
    step_lat = size_m / METRES_PER_DEGREE
    row, row_rest = np.divmod(lat, step_lat)
    middle = (row + 0.5) * step_lat
    step_lon = step_lat / np.maximum(np.cos(np.radians(middle)), 1e-6)
    column, column_rest = np.divmod(lon, step_lon)
    off_middle = np.abs(row_rest / step_lat - 0.5) + np.abs(column_rest / step_lon - 0.5)
    order = np.lexsort((off_middle, column, row, size_m))
    keys = np.stack([size_m, row, column], axis=1)[order]
    first = np.ones(len(order), bool)
    first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    return np.sort(order[first])
