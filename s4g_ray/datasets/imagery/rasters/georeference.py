"""Define Georeference: where the pixels of a raster lie on the Earth, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyproj
import shapely
from numpy.typing import ArrayLike
from shapely.geometry.base import BaseGeometry

from s4g_ray.arrays import Floats64
from s4g_ray.data.area import Extent, join_extents

GEOD = pyproj.Geod(ellps="WGS84")
DEGREES = "EPSG:4326"
EDGE_POINTS = 33  # of each side of a raster, to follow its curved border


@dataclass(frozen=True)
class Georeference:
    """A coordinate reference system, and an affine map from pixels to its coordinates.

    Pixels are counted from the outer corner of the first one: its centre is at 0.5, 0.5.
    transform: a, b, c, d, e, f of x = a * column + b * row + c, y = d * column + e * row + f.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]
    width: int
    height: int

    def to_pixels(self, lat: ArrayLike, lon: ArrayLike) -> tuple[Floats64, Floats64]:
        """Return columns and rows of points, of any shape; NaN where the system has no place."""
        x, y = _transformer(self.crs, False).transform(
            np.asarray(lon, np.float64), np.asarray(lat, np.float64)
        )
        a, b, c, d, e, f = self.transform
        scale = a * e - b * d
        x = np.asarray(x) - c
        y = np.asarray(y) - f
        with np.errstate(invalid="ignore"):  # inf, outside the system
            column = (e * x - b * y) / scale
            row = (a * y - d * x) / scale
        lost = ~(np.isfinite(column) & np.isfinite(row))
        return np.where(lost, np.nan, column), np.where(lost, np.nan, row)

    def to_degrees(self, column: ArrayLike, row: ArrayLike) -> tuple[Floats64, Floats64]:
        """Return lat and lon of positions in pixels; infinite where they lie off the Earth."""
        columns = np.asarray(column, np.float64)
        rows = np.asarray(row, np.float64)
        a, b, c, d, e, f = self.transform
        lon, lat = _transformer(self.crs, True).transform(
            a * columns + b * rows + c, d * columns + e * rows + f
        )
        return np.asarray(lat), np.asarray(lon)

    @cached_property
    def period(self) -> float | None:
        """Return the columns once around the Earth, in systems where that is a plain shift."""
        if self.transform[3]:
            return None
        crs = pyproj.CRS.from_user_input(self.crs)
        if crs.is_geographic:
            return abs(360 / (self.transform[0] * crs.axis_info[0].unit_conversion_factor)) * (
                np.pi / 180
            )
        x, y = _transformer(self.crs, False).transform([0, 45, 90, 90], [0, 0, 0, 40])
        if not np.isfinite([*x, *y]).all():
            return None
        quarter = x[2] - x[0]
        is_cylindrical = np.allclose([x[1] - x[0], x[3] - x[0]], [quarter / 2, quarter], rtol=1e-9)
        is_cylindrical = is_cylindrical and quarter > 0 and np.allclose(y[:3], y[0], atol=1e-6)
        return float(abs(4 * quarter / self.transform[0])) if is_cylindrical else None

    @cached_property
    def resolution_m(self) -> float:
        """Return the metres of ground a pixel spans at the raster's centre (geometric mean)."""
        column = self.width / 2
        row = self.height / 2
        lat, lon = self.to_degrees([column, column + 0.5, column], [row, row, row + 0.5])
        if not np.isfinite([*lat, *lon]).all():
            return float("nan")
        azimuth, _, metres = GEOD.inv([lon[0]] * 2, [lat[0]] * 2, lon[1:], lat[1:])
        angle = np.radians(azimuth[1] - azimuth[0])
        return float(2 * np.sqrt(metres[0] * metres[1] * abs(np.sin(angle))))

    @cached_property
    def border(self) -> Floats64:
        """Return the corners of the footprint: lon, lat [N, 2], with continuous longitudes.

        A raster around a pole has a border that goes along that pole.
        """
        along = np.linspace(0, 1, EDGE_POINTS)[:-1]
        ones = np.ones(EDGE_POINTS - 1)
        column = np.concatenate([along, ones, 1 - along, 0 * ones]) * self.width
        row = np.concatenate([0 * ones, along, ones, 1 - along]) * self.height
        lat, lon = self.to_degrees(column, row)
        known = np.isfinite(lat) & np.isfinite(lon)
        if known.sum() < 3:
            return np.empty((0, 2))
        lat = np.append(lat[known], lat[known][0])
        lon = np.unwrap(np.append(lon[known], lon[known][0]), period=360)
        turn = lon[-1] - lon[0]
        if abs(turn) > 180:
            pole = np.copysign(90.0, lat.mean())
            lat = np.concatenate([lat, [pole, pole]])
            lon = np.concatenate([lon, [lon[-1], lon[0]]])
        return np.stack([lon, lat], axis=1)

    @cached_property
    def extent(self) -> Extent:
        """Return west, south, east, north in degrees; east is above 180 across the antimeridian."""
        lon, lat = self.border.T
        return join_extents([(lon.min(), lat.min(), lon.max(), lat.max())])

    @cached_property
    def footprint(self) -> BaseGeometry:
        """Return the footprint in degrees, cut at the antimeridian."""
        shape = shapely.make_valid(shapely.Polygon(self.border))
        turns = np.floor((np.array(shape.bounds)[[0, 2]] + 180) / 360).astype(int)
        parts = []
        for turn in range(turns[0], turns[1] + 1):
            part = shape.intersection(shapely.box(turn * 360 - 180, -90, turn * 360 + 180, 90))
            parts.append(shapely.transform(part, lambda xy, turn=turn: xy - [turn * 360, 0]))
        return shapely.union_all([part for part in parts if part.area > 0])


@lru_cache(64)
def _transformer(crs: str, inverse: bool) -> pyproj.Transformer:
    """Return the map from lon, lat to the coordinates of a system, or back."""
    ends = (crs, DEGREES) if inverse else (DEGREES, crs)
    return pyproj.Transformer.from_crs(*ends, always_xy=True)
