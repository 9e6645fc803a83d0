"""Draw squares and circles on the ground as GeoJSON geometries (RFC 7946)."""

from __future__ import annotations

from typing import Any

import numpy as np

from s4g_ray.arrays import Floats64
from s4g_ray.data.sphere import EARTH_RADIUS_M, wrap_longitudes

CIRCLE_CORNERS = 64
DIGITS = 7  # of degrees: a centimetre


def point_geometry(lat: float, lon: float) -> dict[str, Any]:
    """Return a Point."""
    return {"type": "Point", "coordinates": [round(float(lon), DIGITS), round(float(lat), DIGITS)]}


def square_geometry(lat: float, lon: float, size_m: float) -> dict[str, Any]:
    """Return the ground square of a tile: size_m on a side, north up about its centre."""
    half = size_m / 2
    east = np.array([-half, half, half, -half])
    north = np.array([-half, -half, half, half])
    return _area_geometry(_move(lat, lon, east, north), lat)


def circle_geometry(lat: float, lon: float, radius_m: float) -> dict[str, Any]:
    """Return a circle of great-circle metres, as a polygon of CIRCLE_CORNERS corners."""
    angle = 2 * np.pi * np.arange(CIRCLE_CORNERS) / CIRCLE_CORNERS
    # beyond a quarter of the Earth a ring would turn inside out
    radius_m = min(radius_m, EARTH_RADIUS_M * np.pi / 2)
    corners = _move(lat, lon, radius_m * np.cos(angle), radius_m * np.sin(angle))
    return _area_geometry(corners, lat)


def _move(lat: float, lon: float, east_m: Floats64, north_m: Floats64) -> Floats64:
    """Return lon, lat [C, 2] at offsets in the azimuthal equidistant frame about a point.

    Longitudes are continuous about that of the point, so that they may lie beyond 180 degrees.
    """
    angle = np.hypot(east_m, north_m) / EARTH_RADIUS_M
    azimuth = np.arctan2(east_m, north_m)
    phi = np.radians(lat)
    sin_phi = np.sin(phi) * np.cos(angle) + np.cos(phi) * np.sin(angle) * np.cos(azimuth)
    moved_phi = np.arcsin(np.clip(sin_phi, -1, 1))
    turn = np.arctan2(
        np.sin(azimuth) * np.sin(angle) * np.cos(phi), np.cos(angle) - np.sin(phi) * sin_phi
    )
    return np.stack([lon + np.degrees(turn), np.degrees(moved_phi)], axis=1)


def _area_geometry(corners: Floats64, centre_lat: float) -> dict[str, Any]:
    """Return a Polygon of counter-clockwise corners [C, 2], cut at the antimeridian.

    An area that holds a pole holds that of its centre's hemisphere. RFC 7946, section 3.1.9: an
    area that crosses the antimeridian is a MultiPolygon.
    """
    lon = np.degrees(np.unwrap(np.radians(np.append(corners[:, 0], corners[0, 0]))))
    corners = np.stack([lon[:-1], corners[:, 1]], axis=1)
    if abs(lon[-1] - lon[0]) > 180:
        pole = 90.0 if centre_lat > 0 else -90.0
        return {"type": "Polygon", "coordinates": [_ring_around_pole(corners, pole)]}
    rings = []
    for shift in (-360.0, 0.0, 360.0):
        part = _clip(_clip(corners + np.array([shift, 0.0]), 180.0, -1), -180.0, 1)
        if len(part) >= 3 and part[:, 0].max() > part[:, 0].min():
            closed = np.round(np.concatenate([part, part[:1]]), DIGITS)
            rings.append(closed.tolist())
    if len(rings) == 1:
        return {"type": "Polygon", "coordinates": rings}
    return {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}


def _ring_around_pole(corners: Floats64, pole: float) -> list[list[float]]:
    """Return the ring of an area that holds a pole: from one end of the map to the other."""
    lon = wrap_longitudes(corners[:, 0])
    order = np.argsort(lon)
    lon = lon[order]
    lat = corners[order, 1]
    border_lat = np.interp(180.0, [lon[-1], lon[0] + 360], [lat[-1], lat[0]])
    edge = [[-180.0, border_lat], *np.stack([lon, lat], axis=1).tolist(), [180.0, border_lat]]
    if pole < 0:
        edge.reverse()
    ring = [*edge, [edge[-1][0], pole], [edge[0][0], pole], edge[0]]
    return [[round(float(x), DIGITS), round(float(y), DIGITS)] for x, y in ring]


def _clip(corners: Floats64, limit: float, side: int) -> Floats64:
    """Keep the part of a ring with side * lon >= side * limit (Sutherland and Hodgman 1974)."""
    kept: list[Floats64] = []
    for i in range(len(corners)):
        here = corners[i]
        after = corners[(i + 1) % len(corners)]
        is_inside = side * (here[0] - limit) >= 0
        if is_inside:
            kept.append(here)
        if is_inside != (side * (after[0] - limit) >= 0):
            share = (limit - here[0]) / (after[0] - here[0])
            kept.append(here + share * (after - here))
    return np.array(kept).reshape(-1, 2)
