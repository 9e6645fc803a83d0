"""Degrees, unit vectors, great-circle metres."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from s4g_ray.arrays import Floats64

EARTH_RADIUS_M = 6_371_008.8  # mean radius, IUGG


def unit_sphere(lat: ArrayLike, lon: ArrayLike) -> Floats64:
    """lat[N], lon[N] in degrees -> xyz[N, 3] on the unit sphere."""
    phi, lam = np.radians(np.asarray(lat, np.float64)), np.radians(np.asarray(lon, np.float64))
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)


def chord_of(radius_m: float) -> float:
    """The chord on the unit sphere of a distance and 6 micrometres more: metres_between settles the border."""
    return float(2 * np.sin(min(radius_m / EARTH_RADIUS_M, np.pi) / 2) * (1 + 1e-9) + 1e-12)


def metres_between(
    lat_a: ArrayLike, lon_a: ArrayLike, lat_b: ArrayLike, lon_b: ArrayLike
) -> Floats64:
    """Great-circle metres between points in degrees, elementwise (haversine, mean Earth radius)."""
    phi_a, lam_a, phi_b, lam_b = (
        np.radians(np.asarray(x, np.float64)) for x in (lat_a, lon_a, lat_b, lon_b)
    )
    half = (
        np.sin((phi_b - phi_a) / 2) ** 2
        + np.cos(phi_a) * np.cos(phi_b) * np.sin((lam_b - lam_a) / 2) ** 2
    )
    return np.asarray(2 * EARTH_RADIUS_M * np.arcsin(np.sqrt(np.minimum(half, 1.0))))


def format_metres(metres: float) -> str:
    """A distance for people: kilometres from 10 km on, metres below."""
    if not np.isfinite(metres):
        return "distance unknown"
    return f"{metres / 1000:,.0f} km" if metres >= 10_000 else f"{metres:,.0f} m"
