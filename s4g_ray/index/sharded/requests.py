"""Define the arguments and results of a shard's methods. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.errors import RunError
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage.manifest import Part


@dataclass(frozen=True)
class Staged:
    """A shard of a version that is built and written but not in service yet.

    Holds what the version's manifest and report need.
    """

    version: int
    part: Part
    info: Mapping[str, Any]
    read_s: float
    build_s: float


@dataclass(frozen=True)
class Coordinates:
    """Where the references of an index lie: ids[N] ascending, lat[N], lon[N]."""

    ids: Ints
    lat: Floats64
    lon: Floats64

    def of(self, ids: Ints) -> Floats64:
        """Return lat, lon of each id: [n, 2]. Raises RunError for an id without them."""
        rows = rows_of(self.ids, ids)
        unknown = ids[rows < 0]
        if len(unknown):
            raise RunError(
                f"{len(unknown)} references have no coordinates, {unknown[0]} among them; give"
                " them for all, or for none"
            )
        return np.stack([self.lat[rows], self.lon[rows]], axis=1)


@dataclass(frozen=True)
class Change:
    """Vectors of one shard to add, replace or remove: ids[n], vectors[n, D], coordinates[n, 2]."""

    action: str  # add, replace or remove
    ids: Ints
    vectors: NDArray[Any] | None = None
    coordinates: Floats64 | None = None

    def apply(self, index: VectorIndex) -> None:
        """Change an index."""
        if self.action == "remove":
            index.remove(self.ids)
            return
        assert self.vectors is not None
        change = index.add if self.action == "add" else index.replace
        change(self.vectors, self.ids, coordinates=self.coordinates)
