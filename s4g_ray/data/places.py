"""Places on the sphere: coordinates and distances, pairs of places, and what excludes them from one batch.

Tasks that mine and plan import this module; scipy's tree, which they do not need, is imported where it is built.
"""

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
        """These places and those of another set, which have no place in common."""
        ids, lat, lon = (
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("ids", "lat", "lon")
        )
        order = np.argsort(ids)
        return Places(ids[order], lat[order], lon[order])

    def rows(self, ids: Ints) -> Ints:
        """The row of each place id, -1 for those that are not there."""
        return rows_of(self.ids, ids)

    @cached_property
    def xyz(self) -> Floats64:
        """xyz[P, 3] on the unit sphere, NaN where unknown."""
        return unit_sphere(self.lat, self.lon)
