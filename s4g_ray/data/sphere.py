"""Convert between degrees, unit vectors and great-circle metres."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from s4g_ray.arrays import Floats32, Floats64, Rows32

EARTH_RADIUS_M = 6_371_008.8  # mean radius, IUGG
METRES_A_DEGREE = EARTH_RADIUS_M * np.pi / 180  # of latitude
AT_ONCE = 2**16  # points that are converted at once, where they are many


def unit_sphere(lat: ArrayLike, lon: ArrayLike) -> Floats64:
    """lat[N], lon[N] in degrees -> xyz[N, 3] on the unit sphere."""
    phi = np.radians(np.asarray(lat, np.float64))
    lam = np.radians(np.asarray(lon, np.float64))
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)


def unit_sphere32(lat: Floats64, lon: Floats64) -> Floats32:
    """lat[N], lon[N] in degrees -> xyz[N, 3] in float32, exact to half a metre: 12 bytes each."""
    xyz = np.empty((len(lat), 3), dtype=np.float32)
    for start in range(0, len(lat), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        xyz[rows] = unit_sphere(lat[rows], lon[rows])
    return xyz


def widest_axis(xyz: Floats32, rows: Rows32) -> int:
    """Return the axis along which rows of xyz[N, 3] spread most, by 4 bytes a row."""
    return int(np.argmax([float(np.ptp(xyz[rows, axis])) for axis in range(3)]))


def wrap_longitudes(lon: ArrayLike) -> Floats64:
    """Return longitudes, or differences of longitudes, in degrees within -180..180 (not 180)."""
    return np.asarray((np.asarray(lon, np.float64) + 180) % 360 - 180)


def span_longitudes(lon: Floats64) -> tuple[float, float]:
    """Return west and east of the smallest span that holds lon[N], 1 or more, within 360 degrees.

    Both are longitudes of points; east is below west where the span crosses 180 degrees.
    """
    lons = np.unique(lon)
    gaps = np.diff(np.append(lons, lons[0] + 360))
    widest = int(gaps.argmax())
    return float(lons[(widest + 1) % len(lons)]), float(lons[widest])


def unroll_longitudes(lon: Floats64) -> Floats64:
    """Return lon[N] in an order that knows the circle: all within the smallest span, going east.

    Longitudes at and to the east of the span's western end stay, those beyond 180 degrees get 360
    more. Sorted, cut or averaged, they follow the ground also where it crosses the antimeridian.
    """
    if not len(lon):
        return lon
    west, _ = span_longitudes(lon)
    return np.where(lon < west, lon + 360, lon)


def half_sides(lat: ArrayLike, size_m: ArrayLike) -> tuple[Floats64, Floats64]:
    """Return half the sides of squares of ground, size_m[N] wide, in degrees of lat and of lon.

    At a pole the second is large, but finite. 0 for an unknown size (NaN).
    """
    half_lat = np.nan_to_num(np.asarray(size_m, np.float64)) / 2 / METRES_A_DEGREE
    shrink = np.cos(np.radians(np.asarray(lat, np.float64)))
    return half_lat, half_lat / np.maximum(shrink, 1e-6)


def chord_of(radius_m: float) -> float:
    """Return the chord on the unit sphere that spans `radius_m` plus 6 micrometres.

    A search by this chord finds a few points too many at the border, never too few; where the
    border matters, metres_between decides.
    """
    angle = min(radius_m / EARTH_RADIUS_M, np.pi)
    return float(2 * np.sin(angle / 2) * (1 + 1e-9) + 1e-12)


def metres_between(
    lat_a: ArrayLike, lon_a: ArrayLike, lat_b: ArrayLike, lon_b: ArrayLike
) -> Floats64:
    """Compute great-circle metres between points in degrees, elementwise.

    By the haversine formula with the mean Earth radius.
    """
    phi_a, lam_a, phi_b, lam_b = (
        np.radians(np.asarray(degrees, np.float64)) for degrees in (lat_a, lon_a, lat_b, lon_b)
    )
    half = (
        np.sin((phi_b - phi_a) / 2) ** 2
        + np.cos(phi_a) * np.cos(phi_b) * np.sin((lam_b - lam_a) / 2) ** 2
    )
    return np.asarray(2 * EARTH_RADIUS_M * np.arcsin(np.sqrt(np.minimum(half, 1.0))))


def format_metres(metres: float) -> str:
    """Format a distance for people: in kilometres from 10 km, below in metres."""
    if not np.isfinite(metres):
        return "distance unknown"
    if metres >= 10_000:
        return f"{metres / 1000:,.0f} km"
    return f"{metres:,.0f} m"
