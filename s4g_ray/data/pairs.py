"""PairTable: query and reference of one place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Ints


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a reference: rows[n], ascending, and columns[n]."""

    rows: Ints
    columns: Ints

    def take(self, rows: slice) -> Pairs:
        """Those of some rows, which are numbered from 0 on."""
        first, last = np.searchsorted(self.rows, [rows.start, rows.stop])
        return Pairs(self.rows[first:last] - rows.start, self.columns[first:last])

    def expand(self, rows: Ints) -> Pairs:
        """For each number i of rows[p], the pairs of row rows[i], as pairs of i."""
        first = np.searchsorted(self.rows, rows, side="left")
        counts = np.searchsorted(self.rows, rows, side="right") - first
        which = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        return Pairs(which, self.columns[np.repeat(first, counts) + within])


def pairs_by_place(rows: Ints, places: Ints, reference_places: Ints) -> Pairs:
    """rows[n], ascending, and a place for each -> pairs with all references of the place."""
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
            raise ValueError("query_ids, reference_ids and place_ids differ in length")

    def __len__(self) -> int:
        return len(self.query_ids)
