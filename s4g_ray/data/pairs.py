"""Define PairTable, the training pairs: a query and a reference of one place.

Pairs holds row numbers instead of ids: evaluation finds in it the references of each query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        counts = np.searchsorted(self.rows, rows, side="right")
        counts -= first
        # from the number of a pair to its position here, for each of the rows
        first += counts
        first -= np.cumsum(counts)
        indices = np.repeat(np.arange(len(rows)), counts)
        positions = np.repeat(first, counts)
        del first, counts  # all rows of a data set may be asked for
        positions += np.arange(len(indices))
        return Pairs(indices, self.columns[positions])


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

    Shares the arrays that are given where the pairs are all of their rows, in their order.
    """
    found = pairs_by_place(np.arange(len(query_places)), query_places, reference_places)
    return PairTable(
        query_ids=take_rows(query_ids, found.rows),
        reference_ids=take_rows(reference_ids, found.columns),
        place_ids=take_rows(query_places, found.rows),
    )


def take_rows(values: NDArray[Any], rows: Ints) -> NDArray[Any]:
    """Return values[rows]; the array itself where the rows are all of its rows, in order."""
    count = len(values)
    # as many as there are, ascending, and none beyond the last
    if len(rows) == count and (rows[1:] > rows[:-1]).all():
        return values
    return values[rows]
