"""Define PairTable, the training pairs: a query and a reference of one place.

Pairs holds row numbers instead of ids: evaluation finds in it the references of each query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Ints


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a reference as row numbers: rows[n], ascending, and columns[n]."""

    rows: Ints
    columns: Ints

    def take(self, rows: slice) -> Pairs:
        """Return the pairs of a range of rows, renumbered from 0."""
        first, last = np.searchsorted(self.rows, [rows.start, rows.stop])
        return Pairs(self.rows[first:last] - rows.start, self.columns[first:last])

    def expand(self, rows: Ints) -> Pairs:
        """Return, for each index i of rows[p], the pairs of row rows[i] as pairs of i."""
        first = np.searchsorted(self.rows, rows, side="left")
        counts = np.searchsorted(self.rows, rows, side="right") - first
        indices = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(indices)) - np.repeat(np.cumsum(counts) - counts, counts)
        return Pairs(indices, self.columns[np.repeat(first, counts) + within])


def pairs_by_place(rows: Ints, places: Ints, reference_places: Ints) -> Pairs:
    """Pair each of rows[n], ascending, with all references of its place, places[n]."""
    order = np.argsort(reference_places, kind="stable")
    expanded = Pairs(reference_places[order], order).expand(places)
    return Pairs(rows[expanded.rows], expanded.columns)


@dataclass(frozen=True)
class PairTable:
    """Training pairs, one a row: query_ids[N], reference_ids[N], place_ids[N], int64."""

    query_ids: Ints
    reference_ids: Ints
    place_ids: Ints

    def __post_init__(self) -> None:
        if not len(self.query_ids) == len(self.reference_ids) == len(self.place_ids):
            raise ValueError(
                f"query_ids, reference_ids and place_ids differ in length: {len(self.query_ids)},"
                f" {len(self.reference_ids)}, {len(self.place_ids)}; give one of each for each pair"
            )

    def __len__(self) -> int:
        return len(self.query_ids)


def join_pairs(
    query_ids: Ints, query_places: Ints, reference_ids: Ints, reference_places: Ints
) -> PairTable:
    """Pair each query with each reference of its place, in the order of the queries.

    Where each query has one reference, the pairs share the arrays of the queries.
    """
    order = np.argsort(reference_places, kind="stable")
    rows = np.arange(len(query_places))
    found = pairs_by_place(rows, query_places, reference_places[order])
    paired = reference_ids[order[found.columns]]
    if np.array_equal(found.rows, rows):
        return PairTable(query_ids, paired, query_places)
    return PairTable(query_ids[found.rows], paired, query_places[found.rows])
