"""ExclusionTable: places that never share a batch, in the flat form that the kernels read."""

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
    """Exclusions over the rows of P places: named pairs, and all places within a radius.

    Place p is excluded from partners[starts[p] : starts[p + 1]] (both directions are in the table;
    starts is empty when no pairs are named), and from each place whose xyz[P, 3] on the unit sphere
    is within the chord (NaN: near none; xyz is empty when there is no radius). Memory is
    O(P + named pairs).
    """

    starts: Ints
    partners: Rows32
    xyz: Floats64
    chord: float

    @classmethod
    def from_exclusions(
        cls, exclusions: NeighborGraph | Exclusions | None, lookup: IdLookup
    ) -> ExclusionTable:
        """Convert exclusions into rows of the lookup's places; drop pairs with other places."""
        places = lookup.places
        no_xyz = np.zeros((0, 3))
        if exclusions is None:
            return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32), no_xyz, 0.0)
        if isinstance(exclusions, NeighborGraph):
            first = np.repeat(lookup.rows(exclusions.place_ids), exclusions.neighbors.shape[1])
            second = lookup.rows(exclusions.neighbors.ravel())
            both_first = np.concatenate([first, second])
            both_second = np.concatenate([second, first])
            starts, partners = _group_by_first(both_first, both_second, len(places))
            return cls(starts, partners, no_xyz, 0.0)
        first = lookup.rows(exclusions.semi_positives.first)
        second = lookup.rows(exclusions.semi_positives.second)
        starts, partners = _group_by_first(first, second, len(places))
        xyz = _compute_xyz(exclusions, places) if exclusions.radius_m > 0 else no_xyz
        return cls(starts, partners, xyz, chord_of(exclusions.radius_m))

    def take(self, rows: Ints) -> ExclusionTable:
        """Return the table over the places rows[p], ascending.

        Arrays are copied, because kernels are compiled anew for read-only arrays.
        """
        xyz = self.xyz[rows] if len(self.xyz) else self.xyz.copy()
        if not len(self.starts):
            return ExclusionTable(self.starts.copy(), self.partners.copy(), xyz, self.chord)
        counts = self.starts[rows + 1] - self.starts[rows]
        first = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        offsets = np.repeat(self.starts[rows] - np.cumsum(counts) + counts, counts)
        partners = self.partners[np.arange(len(first)) + offsets]
        second = IdLookup.from_ids(rows).rows(partners.astype(np.int64))
        starts, partners = _group_by_first(first, second, len(rows))
        return ExclusionTable(starts, partners, xyz, self.chord)


def _group_by_first(first: Rows32, second: Rows32, num_places: int) -> tuple[Ints, Rows32]:
    """Group pairs of rows by the first row: starts[P + 1] (empty without pairs), partners[E].

    Pairs with a row of -1 are dropped.
    """
    is_known = (first >= 0) & (second >= 0)
    first = first[is_known]
    second = second[is_known]
    if not len(first):
        return np.zeros(0, dtype=np.int64), second
    counts = np.bincount(first, minlength=num_places)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return starts, second[np.argsort(first, kind="stable")]


def _compute_xyz(exclusions: Exclusions, places: Ints) -> Floats64:
    """Return xyz[P, 3] of places, NaN where they have no coordinates."""
    xyz = np.empty((len(places), 3))
    for start in range(0, len(places), PLACES_PER_BLOCK):
        block = slice(start, start + PLACES_PER_BLOCK)
        rows = exclusions.places.rows(places[block])
        xyz[block] = unit_sphere(exclusions.places.lat[rows], exclusions.places.lon[rows])
        xyz[block][rows < 0] = np.nan
    return xyz
