"""Compute SDM@k and Dis@k: how far from a query its first k references are.

SDM@K = sum_i (K - i + 1) exp(-s d_i) / sum_i (K - i + 1), i = 1..K, where d_i is the distance to
the reference of rank i: 1 where all are at the query's position. `sdm@k` is that of DenseUAV (arXiv
2201.09201; evaluateDistance.py of its code): d in degrees, as on a plane of latitude and longitude,
s = 5000. `sdm_m@k` is that of GTA-UAV (arXiv 2409.16925; evaluate/gta.py of its code): d in metres,
s = 0.001. `dis@k` is GTA-UAV's mean of d_1..d_k in metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.data.sphere import metres_between, wrap_longitudes

PER_DEGREE = 5e3
PER_METRE = 1e-3


@dataclass(frozen=True)
class TopDistances:
    """The distances from Q queries to their first references: metres[Q, K] and degrees[Q, K].

    K: the largest of ranks. NaN where a position is unknown, or where there are fewer references.
    """

    ranks: tuple[int, ...]
    metres: Floats64
    degrees: Floats64

    @classmethod
    def from_positions(cls, queries: Floats64, references: Floats64, ranks: Sequence[int]) -> Self:
        """Measure from queries[Q, 2] to references[Q, K, 2], in degrees, best first."""
        lat = queries[:, None, 0]
        lon = queries[:, None, 1]
        east = wrap_longitudes(references[..., 1] - lon)
        degrees = np.hypot(references[..., 0] - lat, east)
        metres = metres_between(lat, lon, references[..., 0], references[..., 1])
        return cls(tuple(sorted(set(ranks))), metres, degrees)

    def metrics(self, rows: Bools) -> dict[str, float]:
        """Average over rows[Q] whose position and those of whose first k references are known.

        A k for which there is no such row is left out.
        """
        values = {}
        for k in self.ranks:
            known = rows & np.isfinite(self.metres[:, :k]).all(axis=1)
            if k > self.metres.shape[1] or not known.any():
                continue
            metres = self.metres[known, :k]
            degrees = self.degrees[known, :k]
            values[f"sdm@{k}"] = _weigh(np.exp(-PER_DEGREE * degrees))
            values[f"sdm_m@{k}"] = _weigh(np.exp(-PER_METRE * metres))
            values[f"dis@{k}"] = float(metres.mean())
        return values


def _weigh(nearness: Floats64) -> float:
    """Average nearness[n, k] with the weights k, k - 1, ..., 1 of its columns."""
    weights = np.arange(nearness.shape[1], 0, -1)
    return float((nearness @ weights / weights.sum()).mean())
