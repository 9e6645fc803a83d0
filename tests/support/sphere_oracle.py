"""Make places on the sphere that are hard to get right, and compute their distances slowly."""

from __future__ import annotations

import numpy as np

from s4g_ray.arrays import Floats64
from s4g_ray.data.sphere import EARTH_RADIUS_M

KINDS = ["globe", "poles", "antimeridian", "duplicates", "metres apart", "some unknown"]


def haversine_loop(lat: Floats64, lon: Floats64) -> Floats64:
    """Compute metres[N, N] by the textbook formula, one pair at a time."""
    metres = np.zeros((len(lat), len(lat)))
    for i in range(len(lat)):
        for j in range(len(lat)):
            phi_i = np.radians(lat[i])
            phi_j = np.radians(lat[j])
            half_phi = np.sin((phi_j - phi_i) / 2)
            half_lam = np.sin(np.radians(lon[j] - lon[i]) / 2)
            a = half_phi**2 + np.cos(phi_i) * np.cos(phi_j) * half_lam**2
            metres[i, j] = 2 * EARTH_RADIUS_M * np.arctan2(np.sqrt(a), np.sqrt(max(0.0, 1 - a)))
    return metres


def points(kind: str) -> tuple[Floats64, Floats64]:
    """Make 60 places in degrees; the kind names the difficulty."""
    assert kind in KINDS
    rng = np.random.default_rng(11)
    lat = np.degrees(np.arcsin(rng.uniform(-1, 1, 60)))
    lon = rng.uniform(-180, 180, 60)
    if kind == "poles":
        lat = np.concatenate([np.full(10, 90.0), np.full(10, -90.0), rng.uniform(88, 90, 40)])
    elif kind == "antimeridian":
        lat = rng.uniform(-1, 1, 60)
        side = np.where(rng.random(60) < 0.5, 179.99, -179.99)
        lon = side + rng.uniform(-0.01, 0.01, 60)
    elif kind == "duplicates":
        lat = np.repeat(lat[:6], 10)
        lon = np.repeat(lon[:6], 10)
    elif kind == "metres apart":
        lat = 51.5 + rng.uniform(0, 1e-4, 60)
        lon = rng.uniform(0, 1e-4, 60)
    elif kind == "some unknown":
        lat[::7] = np.nan
        lon[::7] = np.nan
    return lat, lon
