"""What bars places from one batch, in the flat form that the planner's kernel reads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from s4g_ray.arrays import Floats64, Ints, Rows32
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.sphere import chord_of, unit_sphere
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.sampling.compact_graph import IdLookup

PLACES_PER_BLOCK = 200_000  # whose coordinates are converted at once: bounds the temporaries


class ExclusionTable(NamedTuple):
    """Over the rows of P places: named pairs, and all within a radius of each other. O(P + named pairs) memory.

    Place p never meets members[starts[p] : starts[p + 1]] (both directions are there; starts is empty when
    nothing is named), nor a place whose xyz[P, 3] on the unit sphere is within the chord (NaN: near none; xyz is
    empty when there is no radius).
    """

    starts: Ints
    members: Rows32
    xyz: Floats64
    chord: float

    @classmethod
    def from_exclusions(
        cls, exclusions: NeighborGraph | Exclusions | None, lookup: IdLookup
    ) -> ExclusionTable:
        """In rows of the lookup's places; pairs with other places are dropped."""
        places, nowhere = lookup.places, np.zeros((0, 3))
        if exclusions is None:
            return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32), nowhere, 0.0)
        if isinstance(exclusions, NeighborGraph):
            first = np.repeat(lookup.rows(exclusions.place_ids), exclusions.neighbors.shape[1])
            second = lookup.rows(exclusions.neighbors.ravel())
            both = np.concatenate([first, second]), np.concatenate([second, first])
            return cls(*_by_first(*both, len(places)), nowhere, 0.0)
        semi, radius = exclusions.semi_positives, exclusions.radius_m
        named = _by_first(lookup.rows(semi.first), lookup.rows(semi.second), len(places))
        return cls(*named, _xyz_of(exclusions, places) if radius > 0 else nowhere, chord_of(radius))

    def take(self, rows: Ints) -> ExclusionTable:
        """In rows of some of the places, rows[p], ascending. Copied: kernels are compiled anew for read-only arrays."""
        xyz = self.xyz[rows] if len(self.xyz) else self.xyz.copy()
        if not len(self.starts):
            return ExclusionTable(self.starts.copy(), self.members.copy(), xyz, self.chord)
        counts = self.starts[rows + 1] - self.starts[rows]
        first = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        offsets = np.repeat(self.starts[rows] - np.cumsum(counts) + counts, counts)
        members = self.members[np.arange(len(first)) + offsets]
        return ExclusionTable(
            *_by_first(first, IdLookup.from_ids(rows).rows(members.astype(np.int64)), len(rows)),
            xyz,
            self.chord,
        )


def _by_first(first: Rows32, second: Rows32, num_places: int) -> tuple[Ints, Rows32]:
    """Pairs of rows, -1 where there is none, grouped by the first: starts[P + 1] (empty without pairs), members[E]."""
    known = (first >= 0) & (second >= 0)
    first, second = first[known], second[known]
    if not len(first):
        return np.zeros(0, dtype=np.int64), second
    starts = np.concatenate([[0], np.cumsum(np.bincount(first, minlength=num_places))]).astype(
        np.int64
    )
    return starts, second[np.argsort(first, kind="stable")]


def _xyz_of(exclusions: Exclusions, places: Ints) -> Floats64:
    """xyz[P, 3] of places, NaN where there are no coordinates."""
    xyz = np.empty((len(places), 3))
    for start in range(0, len(places), PLACES_PER_BLOCK):
        block = slice(start, start + PLACES_PER_BLOCK)
        rows = exclusions.places.rows(places[block])
        xyz[block] = unit_sphere(exclusions.places.lat[rows], exclusions.places.lon[rows])
        xyz[block][rows < 0] = np.nan
    return xyz
