"""Places on the sphere that are hard to get right, and a slow oracle of their distances."""

from __future__ import annotations

import numpy as np

from s4g_ray.arrays import Floats64
from s4g_ray.data.sphere import EARTH_RADIUS_M

KINDS = ["globe", "poles", "antimeridian", "duplicates", "metres apart", "some unknown"]


def haversine_loop(lat: Floats64, lon: Floats64) -> Floats64:
    """metres[N, N] by the textbook formula, one pair at a time."""
    metres = np.zeros((len(lat), len(lat)))
    for i in range(len(lat)):
        for j in range(len(lat)):
            p, q = np.radians(lat[i]), np.radians(lat[j])
            dl = np.radians(lon[j] - lon[i])
            a = np.sin((q - p) / 2) ** 2 + np.cos(p) * np.cos(q) * np.sin(dl / 2) ** 2
            metres[i, j] = 2 * EARTH_RADIUS_M * np.arctan2(np.sqrt(a), np.sqrt(max(0.0, 1 - a)))
    return metres


def points(kind: str) -> tuple[Floats64, Floats64]:
    """60 places by what is hard about them, in degrees."""
    assert kind in KINDS
    rng = np.random.default_rng(11)
    lat, lon = np.degrees(np.arcsin(rng.uniform(-1, 1, 60))), rng.uniform(-180, 180, 60)
    if kind == "poles":
        lat = np.concatenate([np.full(10, 90.0), np.full(10, -90.0), rng.uniform(88, 90, 40)])
    elif kind == "antimeridian":
        lat, lon = (
            rng.uniform(-1, 1, 60),
            np.where(rng.random(60) < 0.5, 179.99, -179.99) + rng.uniform(-0.01, 0.01, 60),
        )
    elif kind == "duplicates":
        lat, lon = np.repeat(lat[:6], 10), np.repeat(lon[:6], 10)
    elif kind == "metres apart":
        lat, lon = 51.5 + rng.uniform(0, 1e-4, 60), rng.uniform(0, 1e-4, 60)
    elif kind == "some unknown":
        lat[::7], lon[::7] = np.nan, np.nan
    return lat, lon
