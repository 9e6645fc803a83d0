"""Define Places: ids and coordinates of places."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.sphere import unit_sphere
from s4g_ray.row_lookup import rows_of


@dataclass(frozen=True)
class Places:
    """ids[P], ascending, and coordinates in degrees, NaN where unknown."""

    ids: Ints
    lat: Floats64
    lon: Floats64

    def __len__(self) -> int:
        return len(self.ids)

    def union(self, other: Places) -> Places:
        """Return these places and those of another set, which has no place in common with it."""
        ids = np.concatenate([self.ids, other.ids])
        lat = np.concatenate([self.lat, other.lat])
        lon = np.concatenate([self.lon, other.lon])
        order = np.argsort(ids)
        return Places(ids[order], lat[order], lon[order])

    def rows(self, ids: Ints) -> Ints:
        """Return the row of each place id, -1 for ids that are not in the set."""
        return rows_of(self.ids, ids)

    @cached_property
    def xyz(self) -> Floats64:
        """Compute xyz[P, 3] on the unit sphere, NaN where unknown."""
        return unit_sphere(self.lat, self.lon)

    def precompute(self) -> Floats64:
        """Compute xyz now, so that copies sent to other processes hold it already."""
        return self.xyz
