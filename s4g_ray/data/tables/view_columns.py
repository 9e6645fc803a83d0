"""Hold the compact columns of a data set's rows that validation has read, sorted by id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Ints
from s4g_ray.data.image_table import View
from s4g_ray.data.schema import SPLITS

SPLIT_CODES = {name: code for code, name in enumerate(SPLITS["references"])}


@dataclass(frozen=True)
class SemiPositives:
    """The semi-positive places of queries that have any, sorted by query id.

    place_ids[offsets[i] : offsets[i + 1]] are those of the query query_ids[i], as they were given.
    """

    query_ids: Ints  # [n]
    offsets: Ints  # [n + 1]
    place_ids: Ints

    @classmethod
    def from_lengths(cls, query_ids: Ints, lengths: Ints, place_ids: Ints) -> SemiPositives:
        """Make them from the number of places of each query."""
        offsets = np.zeros(len(query_ids) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(query_ids, offsets, place_ids)

    def __len__(self) -> int:
        return len(self.query_ids)

    def expand(self) -> tuple[Ints, Ints]:
        """Return query_ids[p] and place_ids[p] of all pairs of a query and a place."""
        return np.repeat(self.query_ids, np.diff(self.offsets)), self.place_ids

    def contains(self, query_ids: Ints, place_ids: Ints) -> Bools:
        """Return which of place_ids[Q, k] are semi-positive for the query query_ids[Q]."""
        found = np.zeros(place_ids.shape, dtype=bool)
        at = np.searchsorted(self.query_ids, query_ids)
        at[at == len(self)] = 0
        known = np.flatnonzero(self.query_ids[at] == query_ids) if len(self) else at[:0]
        starts = self.offsets[at[known]]
        lengths = self.offsets[at[known] + 1] - starts
        for i in range(int(lengths.max(initial=0))):
            rows = known[lengths > i]
            places = self.place_ids[starts[lengths > i] + i]
            found[rows] |= place_ids[rows] == places[:, None]
        return found

    def take(self, rows: Ints) -> SemiPositives:
        """Return those of rows[m] of the queries, in their order."""
        lengths = np.diff(self.offsets)[rows]
        starts = np.repeat(self.offsets[rows] - (np.cumsum(lengths) - lengths), lengths)
        places = self.place_ids[starts + np.arange(len(starts))]
        return SemiPositives.from_lengths(self.query_ids[rows], lengths, places)


@dataclass(frozen=True)
class ViewColumns:
    """Columns of the N rows of a view, sorted by id: 33 bytes a reference, 17 or 21 a query.

    `values` holds id and place_id, of references lat and lon, of queries heading_deg; NaN for null.
    Their arrays are shared with the callers of `read`, who must not change them.
    """

    splits: NDArray[np.uint8]  # as in SPLIT_CODES
    values: dict[str, NDArray[Any]]
    semi_positives: SemiPositives | None = None  # of queries

    def read(self, splits: Sequence[str], names: Sequence[str]) -> list[NDArray[Any]]:
        """Return columns of the rows of some splits; no copies where those are all rows."""
        chosen = self._is_in(self.splits, splits)
        if chosen.all():
            return [self.values[name] for name in names]
        return [self.values[name][chosen] for name in names]

    def find_semi_positives(self, split: str) -> SemiPositives:
        """Return the semi-positives of the queries of a split."""
        semi = self.semi_positives
        if semi is None or not len(semi):
            none = np.zeros(0, np.int64)
            return SemiPositives.from_lengths(none, none, none)
        rows = np.searchsorted(self.values["id"], semi.query_ids)
        chosen = self._is_in(self.splits[rows], [split])
        return semi if chosen.all() else semi.take(np.flatnonzero(chosen))

    def count_splits(self) -> dict[str, int]:
        """Count the rows of each split, without splits that have none."""
        counts = np.bincount(self.splits, minlength=len(SPLIT_CODES)).tolist()
        return {name: counts[code] for name, code in SPLIT_CODES.items() if counts[code]}

    @staticmethod
    def _is_in(codes: NDArray[np.uint8], splits: Sequence[str]) -> Bools:
        wanted = np.zeros(len(SPLIT_CODES), dtype=bool)
        wanted[[SPLIT_CODES[name] for name in splits if name in SPLIT_CODES]] = True
        return np.asarray(wanted[codes])


class HeldColumns:
    """The columns of both views, until they are released. Copies in other processes hold none."""

    def __init__(self, views: dict[View, ViewColumns] | None = None) -> None:
        self._views = dict(views or {})

    def find(self, view: View, names: Sequence[str]) -> ViewColumns | None:
        """Return the columns of a view where they hold all names; None otherwise."""
        columns = self._views.get(view)
        if columns is None or any(name not in columns.values for name in names):
            return None
        return columns

    def count_splits(self, view: View) -> dict[str, int]:
        """Count the rows of each split of a view, without splits that have none."""
        return self._views[view].count_splits()

    def release(self) -> None:
        """Drop the columns: later reads go to the files."""
        self._views.clear()

    def __reduce__(self) -> tuple[type[HeldColumns], tuple[()]]:
        return HeldColumns, ()
