"""Define Area: a part of the Earth's surface, which tells the points that lie in it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.data.sphere import half_sides, metres_between
from s4g_ray.errors import InputError

Extent = tuple[float, float, float, float]  # west, south, east, north; east may exceed 180
METRES_PER_DEGREE = 111_194.0  # of latitude, a little less than 6_371_008.8 m * pi / 180


@dataclass(frozen=True)
class _Circle:
    """Points within radius_m of a point."""

    lat: float
    lon: float
    radius_m: float

    def contains(self, lat: Floats64, lon: Floats64) -> Bools:
        found = np.abs(lat - self.lat) <= self.radius_m / METRES_PER_DEGREE
        rows = np.flatnonzero(found)  # few points need the distance
        found[rows] = metres_between(self.lat, self.lon, lat[rows], lon[rows]) <= self.radius_m
        return found

    def extent(self) -> Extent:
        reach = self.radius_m / METRES_PER_DEGREE
        south = max(self.lat - reach, -90.0)
        north = min(self.lat + reach, 90.0)
        width = 180.0
        if south > -90 and north < 90:
            ratio = np.sin(np.radians(reach)) / np.cos(np.radians(self.lat))
            width = float(np.degrees(np.arcsin(min(ratio, 1.0))))
        return self.lon - width, south, self.lon + width, north


@dataclass(frozen=True)
class _Bounds:
    """Points between two parallels and two meridians, eastwards from `west`; edges count."""

    west: float
    south: float
    width: float
    north: float

    def contains(self, lat: Floats64, lon: Floats64) -> Bools:
        return (lat >= self.south) & (lat <= self.north) & ((lon - self.west) % 360 <= self.width)

    def extent(self) -> Extent:
        return self.west, self.south, self.west + self.width, self.north


@dataclass(frozen=True, eq=False)
class _Polygon:
    """Points within an odd number of rings: the first ring, without the holes that follow.

    rings: lon, lat of the corners [C, 2], the last one the first again, longitudes continuous.
    """

    rings: tuple[Floats64, ...]

    def contains(self, lat: Floats64, lon: Floats64) -> Bools:
        corners = np.concatenate(self.rings)
        west, south = corners.min(axis=0)
        east, north = corners.max(axis=0)
        near = (lat >= south) & (lat <= north)
        rows = np.flatnonzero(near)
        rows = rows[np.argsort(lat[rows], kind="stable")]
        inside = np.zeros(len(lat), bool)
        eastwards = west + (lon[rows] - west) % 360
        # a polygon wider than 360 degrees, or one that ends at the other side, has a point twice
        for shift in (0.0, 360.0):
            if west + shift <= east:
                inside[rows] |= self._holds(lat[rows], eastwards + shift)
        return inside

    def extent(self) -> Extent:
        west, south = self.rings[0].min(axis=0)
        east, north = self.rings[0].max(axis=0)
        return float(west), float(south), float(east), float(north)

    def _holds(self, lat: Floats64, lon: Floats64) -> Bools:
        """Return which points, ordered by lat, have an odd number of edges to their east."""
        odd = np.zeros(len(lat), bool)
        for ring in self.rings:
            for (lon_a, lat_a), (lon_b, lat_b) in itertools.pairwise(ring):
                low, high = min(lat_a, lat_b), max(lat_a, lat_b)
                # an edge holds its lower end, not its upper one: a corner counts once
                part = slice(np.searchsorted(lat, low), np.searchsorted(lat, high))
                share = (lat[part] - lat_a) / (lat_b - lat_a) if high > low else 0.0
                odd[part] ^= lon[part] < lon_a + share * (lon_b - lon_a)
        return odd


_Shape = _Circle | _Bounds | _Polygon


@dataclass(frozen=True)
class Area:
    """The union of shapes, made by `circle`, `bounds`, `polygon`, `from_geojson` and `union`.

    Degrees of WGS 84. Small and picklable.
    """

    shapes: tuple[_Shape, ...]

    @classmethod
    def circle(cls, lat: float, lon: float, radius_m: float) -> Self:
        """Return the area within great-circle metres of a point. Raises InputError."""
        _check_latitude(lat)
        if not np.isfinite(lon) or not radius_m >= 0:
            raise InputError(f"a circle needs a longitude and a radius of 0 m or more, {radius_m=}")
        return cls((_Circle(float(lat), float(lon), float(radius_m)),))

    @classmethod
    def bounds(cls, west: float, south: float, east: float, north: float) -> Self:
        """Return the area between meridians and parallels, edges included.

        It crosses the antimeridian where west is east of east: bounds(170, -20, -170, 0) is 20
        degrees wide. Raises InputError for south above north, and for other latitudes than
        -90..90.
        """
        _check_latitude(south)
        _check_latitude(north)
        if south > north or not np.isfinite([west, east]).all():
            raise InputError(
                f"bounds {west:g}, {south:g}, {east:g}, {north:g} are not west, south, east, north"
            )
        width = 360.0 if east - west >= 360 else (east - west) % 360
        return cls((_Bounds(float(west), float(south), width, float(north)),))

    @classmethod
    def polygon(cls, rings: Sequence[ArrayLike]) -> Self:
        """Return the area of a polygon: rings of lon, lat [C, 2], the first its border, then holes.

        As in GeoJSON (RFC 7946): edges are straight in degrees, and a ring may name its first
        corner again at its end. An edge takes the shorter way in longitude, so that a ring may
        cross the antimeridian; one of exactly 360 degrees goes around. On which side a point on an
        edge lies is not defined. Raises InputError for other shapes, and for a ring around a pole.
        """
        if not len(rings):
            raise InputError("a polygon needs a ring of at least 3 corners")
        first = _close_ring(rings[0])
        holes = [_beside(first, _close_ring(ring)) for ring in rings[1:]]
        return cls((_Polygon((first, *holes)),))

    @classmethod
    def from_geojson(cls, value: Mapping[str, Any]) -> Self:
        """Return the area of a GeoJSON object: all its polygons, in geometries or features.

        Raises InputError for an object without polygons, and for other geometries.
        """
        try:
            shapes = tuple(_shapes_of(value))
        except (KeyError, TypeError) as error:
            raise InputError(f"this GeoJSON is not as RFC 7946 has it: {error!r}") from error
        if not shapes:
            raise InputError("this GeoJSON has no polygon")
        return cls(shapes)

    def union(self, other: Area) -> Area:
        """Return the points that lie in either area."""
        return Area((*self.shapes, *other.shapes))

    @property
    def extent(self) -> Extent:
        """Return west, south, east, north around the area; east is 180 or more across 180."""
        return join_extents([shape.extent() for shape in self.shapes])

    def contains(self, lat: ArrayLike, lon: ArrayLike) -> Bools:
        """Return which points lat[N], lon[N] lie in the area; unknown ones (NaN) do not."""
        lats = np.asarray(lat, np.float64)
        lons = np.asarray(lon, np.float64)
        found = np.zeros(lats.shape, bool)
        known = np.isfinite(lats) & np.isfinite(lons)
        for shape in self.shapes:
            rows = np.flatnonzero(known & ~found)
            found[rows] = shape.contains(lats[rows], lons[rows])
        return found


def extent_of_squares(lat: Floats64, lon: Floats64, size_m: Floats64) -> Extent:
    """Return the extent around squares of ground, size_m[N] wide, with their centres at lat, lon.

    A square of unknown size (NaN) counts as its centre.
    """
    half_lat, half_lon = half_sides(lat, size_m)
    half_lon = np.minimum(half_lon, 180.0)
    south = np.maximum(lat - half_lat, -90.0)
    north = np.minimum(lat + half_lat, 90.0)
    return join_extents(np.stack([lon - half_lon, south, lon + half_lon, north], axis=1))


def join_extents(extents: Sequence[Extent] | Floats64) -> Extent:
    """Return the smallest extent around all: west within -180..180, east at most 360 more."""
    west, south, east, north = np.array(extents, np.float64).T
    width = np.minimum(east - west, 360)
    start = (west + 180) % 360
    order = np.argsort(start, kind="stable")
    start = start[order]
    reached = np.maximum.accumulate(start + width[order])
    # gap before each extent, going east; before the first one comes the last one's end
    gaps = start - np.concatenate([[reached[-1] - 360], reached[:-1]])
    first = int(np.argmax(gaps))
    if gaps[first] <= 0:
        return -180.0, float(south.min()), 180.0, float(north.max())
    low = float(start[first]) - 180
    return low, float(south.min()), low + 360 - float(gaps[first]), float(north.max())


def _check_latitude(lat: float) -> None:
    if not -90 <= lat <= 90:
        raise InputError(f"a latitude of {lat:g} is not within -90..90 degrees")


def _close_ring(ring: ArrayLike) -> Floats64:
    """Return the corners of a ring with continuous longitudes, the last one the first again."""
    try:
        corners: NDArray[Any] = np.array(ring, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("a ring must be a list of lon, lat pairs") from error
    if corners.ndim != 2 or corners.shape[1] not in (2, 3) or not np.isfinite(corners).all():
        raise InputError(f"a ring{list(corners.shape)} is not a list of finite lon, lat pairs")
    corners = corners[:, :2]  # GeoJSON allows a height
    if (corners[0] != corners[-1]).any():
        corners = np.concatenate([corners, corners[:1]])
    if len(corners) < 4:
        raise InputError("a ring needs at least 3 corners")
    if (np.abs(corners[:, 1]) > 90).any():
        raise InputError("latitudes of a ring must lie within -90..90 degrees; give lon, then lat")
    steps = np.diff(corners[:, 0])
    # the shorter way; a step of exactly 360 stays, or a rectangle around the Earth would vanish
    turns = np.where(np.abs(steps) == 360, 0.0, -np.round(steps / 360))
    lon = corners[:, 0] + 360 * np.concatenate([[0.0], np.cumsum(turns)])
    if lon[-1] != lon[0]:
        raise InputError(
            "a ring goes around a pole; cut it at a meridian, with corners at the pole, or use a"
            " circle"
        )
    return np.stack([lon, corners[:, 1]], axis=1)


def _beside(border: Floats64, hole: Floats64) -> Floats64:
    """Shift a hole by full turns to the longitudes of its border."""
    turns = round(float(border[:, 0].mean() - hole[:, 0].mean()) / 360)
    shifted: Floats64 = hole + np.array([360.0 * turns, 0.0])
    return shifted


def _shapes_of(value: Mapping[str, Any]) -> list[_Shape]:
    """Return the polygons of a GeoJSON object."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "FeatureCollection":
        return [shape for feature in value["features"] for shape in _shapes_of(feature)]
    if kind == "Feature":
        return [] if value["geometry"] is None else _shapes_of(value["geometry"])
    if kind == "GeometryCollection":
        return [shape for geometry in value["geometries"] for shape in _shapes_of(geometry)]
    if kind == "Polygon":
        return list(Area.polygon(value["coordinates"]).shapes)
    if kind == "MultiPolygon":
        return [shape for rings in value["coordinates"] for shape in Area.polygon(rings).shapes]
    raise InputError(f"GeoJSON of type {kind!r} is no area; give polygons")
