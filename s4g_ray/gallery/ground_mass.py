"""Spread the probability of a query's candidates on the ground: the best point, and its radii."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from s4g_ray.arrays import Floats64
from s4g_ray.data.sphere import EARTH_RADIUS_M, metres_between, unit_sphere

NEAR_SIZES = 0.75  # candidates within so many tile sides support the same point
NUM_POINTS = 48  # that stand for the ground where a candidate's truth may lie
GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))
LEAST_RADIUS_SIZES = 0.02  # in tile sides: no position is known better


@dataclass(frozen=True)
class GroundMass:
    """The most probable point, and the probability within each distance from it.

    metres[P] ascending, mass[P]: the probability that the truth lies no farther away. The last
    value of mass is 1.
    """

    lat: float
    lon: float
    metres: Floats64
    mass: Floats64

    @classmethod
    def spread(
        cls,
        shares: Floats64,
        rest: float,
        lat: Floats64,
        lon: Floats64,
        size_m: Floats64,
        offsets: Floats64,
        region: Floats64,
    ) -> Self | None:
        """Spread the shares[k] of candidates at lat, lon, size_m [k], and the rest over a region.

        offsets[O]: quantiles, ascending and evenly spaced, of the distance between a right tile's
        centre and the truth, in tile sides. region[S, 2]: lat, lon of points that stand for the
        gallery; without any, the candidates carry all. The point is the mean of the candidates
        around the one that most probability lies near. Returns None when no candidate has both a
        position and a share.
        """
        usable = np.isfinite(lat) & np.isfinite(lon) & (shares > 0)
        if not usable.any():
            return None
        share, size = shares[usable], size_m[usable]
        lats, lons = lat[usable], lon[usable]
        xyz = unit_sphere(lats, lons)
        chords = np.linalg.norm(xyz[:, None] - xyz[None], axis=2) * EARTH_RADIUS_M
        support = (share * (chords < NEAR_SIZES * size[:, None])).sum(axis=1)
        centre = int(np.argmax(support + 1e-9 * share))
        near = chords[centre] < NEAR_SIZES * size[centre]
        mean = (share[near, None] * xyz[near]).sum(axis=0)
        point_lat = float(np.degrees(np.arctan2(mean[2], np.hypot(mean[0], mean[1]))))
        point_lon = float(np.degrees(np.arctan2(mean[1], mean[0])))
        away = metres_between(point_lat, point_lon, lats, lons)[:, None]
        quantile = (np.arange(NUM_POINTS) + 0.5) / NUM_POINTS
        levels = (np.arange(len(offsets)) + 0.5) / len(offsets)
        reach = np.interp(quantile, levels, offsets) * size[:, None]
        cosine = np.cos(np.arange(NUM_POINTS) * GOLDEN_ANGLE)
        # the law of cosines in the plane: a tile is small against the Earth
        metres = np.sqrt(np.maximum(away**2 + reach**2 + 2 * away * reach * cosine, 0.0)).ravel()
        weights = np.repeat(share / NUM_POINTS, NUM_POINTS)
        if len(region) and rest > 0:
            beyond = metres_between(point_lat, point_lon, region[:, 0], region[:, 1])
            metres = np.concatenate([metres, beyond])
            weights = np.concatenate([weights, np.full(len(region), rest / len(region))])
        metres = np.maximum(metres, LEAST_RADIUS_SIZES * float(size[centre]))
        order = np.argsort(metres)
        mass = np.cumsum(weights[order])
        return cls(point_lat, point_lon, metres[order], mass / mass[-1])

    def radius(self, level: float) -> float:
        """Return the least distance within which `level` of the probability lies."""
        return float(np.interp(level, self.mass, self.metres))

    def distance_to(self, lat: float, lon: float) -> float:
        """Return the metres between the most probable point and another."""
        return float(metres_between(self.lat, self.lon, lat, lon))

    def level_at(self, distance_m: float) -> float:
        """Return the probability that lies within a distance, between its points linearly."""
        return float(np.interp(distance_m, self.metres, self.mass, left=0.0))
