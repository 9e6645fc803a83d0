"""CompactGraph: a neighbor graph as int32 rows of a sorted list of places.

It has half the size of a graph of ids, and is read part by part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np

from s4g_ray.arrays import Ints, Rows32, by_rows
from s4g_ray.data.tables.neighbor_graph import GraphPart, NeighborGraph, read_graph_part
from s4g_ray.storage.manifest import open_published

# a table over the range of the ids is used when that range is at most this many times their number
DENSE_SPAN = 4
_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: consecutive ids spread over the table


class IdLookup(NamedTuple):
    """Find the row of a place id.

    The table covers the range of the ids where that is dense; otherwise it is an open-addressing
    hash table.
    """

    places: Ints
    table: Rows32  # rows, -1 where empty
    low: int  # the id of table[0]; unused when hashed
    shift: int  # of the hash; 0: the table is dense

    @classmethod
    def from_ids(cls, places: Ints) -> IdLookup:
        """Build the lookup of places[P], ascending.

        Raises ValueError when they are not ascending, or are more than an int32 counts.
        """
        if len(places) > np.iinfo(np.int32).max:
            raise ValueError(
                f"{len(places)} places are more than {np.iinfo(np.int32).max}; split the data set"
            )
        if (places[1:] <= places[:-1]).any():
            raise ValueError("places are not ascending or repeat one; pass np.unique of them")
        span = int(places[-1]) - int(places[0]) + 1 if len(places) else 0
        if span <= DENSE_SPAN * len(places):
            table = np.full(span, -1, dtype=np.int32)
            low = int(places[0]) if span else 0
            table[places - low] = np.arange(len(places), dtype=np.int32)
            return cls(places, table, low, 0)
        bits = (2 * len(places)).bit_length()
        table = np.full(1 << bits, -1, dtype=np.int32)
        _fill_hash_table(places, table, 64 - bits)
        return cls(places, table, 0, 64 - bits)

    def rows(self, ids: Ints) -> Rows32:
        """Return the row of each of ids[n], -1 for ids that are not among the places."""
        found = np.empty(len(ids), dtype=np.int32)
        _find_rows(self, np.ascontiguousarray(ids), found)
        return found


@dataclass(frozen=True)
class CompactGraph:
    """A neighbor graph: places[P] int64, ascending; rows[P, K] int32, nearest first.

    `rows` are rows of `places`, or of the places `among` that the graph was made with, ascending
    too; -1 pads at the end. Neighbors outside of these are dropped. A place that the original
    graph does not hold has no neighbors.
    """

    places: Ints
    rows: Rows32

    @classmethod
    def from_graph(
        cls, graph: NeighborGraph, places: Ints, width: int, *, among: Ints | None = None
    ) -> CompactGraph:
        """Take the nearest `width` of each place's neighbors that are among the places.

        Raises ValueError as IdLookup.from_ids does.
        """
        k = graph.neighbors.shape[1]
        part = GraphPart(
            graph.place_ids, np.arange(len(graph.place_ids) + 1) * k, graph.neighbors.ravel()
        )
        return cls._from_parts([part], places, min(width, k), among)

    @classmethod
    def read(cls, uri: str, places: Ints, width: int, *, among: Ints | None = None) -> CompactGraph:
        """Read a published graph part by part, as from_graph: memory is the result and one part.

        Raises RunError when it is unpublished or altered.
        """
        manifest = open_published(uri, "neighbors")
        parts = (read_graph_part(uri, part) for part in manifest.parts)
        return cls._from_parts(parts, places, min(width, int(manifest.info["k"])), among)

    @classmethod
    def _from_parts(
        cls, parts: Iterable[GraphPart], places: Ints, width: int, among: Ints | None
    ) -> CompactGraph:
        own = IdLookup.from_ids(places)
        known = own if among is None else IdLookup.from_ids(among)
        rows = np.full((len(places), width), -1, dtype=np.int32)
        for part in parts:
            fill_rows(rows, known, part, own.rows(part.places))
            del part  # frees it before the next one is read
        return cls(places, rows)


def fill_rows(
    rows: Rows32,
    known: IdLookup,
    part: GraphPart,
    targets: Rows32,
    *,
    num_threads: int | None = None,
) -> None:
    """Write the neighbors of part.places[i] into rows[targets[i]], as rows of `known` places.

    Places with a target of -1 are skipped.
    """

    def fill_range(first: int, last: int) -> None:
        _fill_rows(first, last, rows, known, targets, part.offsets, part.ids)

    by_rows(fill_range, len(targets), num_threads)


@numba.njit(cache=True)
def _fill_hash_table(
    places: Ints, table: Rows32, shift: int
) -> None:  # pragma: no cover (compiled)
    for row in range(len(places)):
        at = np.int64((np.uint64(places[row]) * _HASH) >> np.uint64(shift))
        while table[at] >= 0:
            at = (at + 1) & (len(table) - 1)
        table[at] = row


@numba.njit(cache=True)
def find_row(lookup: IdLookup, place: Any) -> Any:  # pragma: no cover (compiled)
    """Return the row of a place id, -1 when there is none."""
    if lookup.shift == 0:
        at = place - lookup.low
        if at < 0 or at >= len(lookup.table):  # as one expression this took 15 times as long
            return np.int32(-1)
        return lookup.table[at]
    at = np.int64((np.uint64(place) * _HASH) >> np.uint64(lookup.shift))
    while lookup.table[at] >= 0 and lookup.places[lookup.table[at]] != place:
        at = (at + 1) & (len(lookup.table) - 1)
    return lookup.table[at]


@numba.njit(cache=True, nogil=True)
def _find_rows(lookup: IdLookup, ids: Ints, found: Rows32) -> None:  # pragma: no cover (compiled)
    for i in range(len(ids)):
        found[i] = find_row(lookup, ids[i])


@numba.njit(cache=True, nogil=True)
def _fill_rows(
    start: int,
    stop: int,
    rows: Rows32,
    lookup: IdLookup,
    targets: Rows32,
    offsets: Ints,
    ids: Ints,
) -> None:  # pragma: no cover (compiled)
    for i in range(start, stop):
        target = targets[i]
        size = 0
        if target < 0:
            continue
        for j in range(offsets[i], offsets[i + 1]):
            if size == rows.shape[1]:
                break
            row = find_row(lookup, ids[j])
            if row >= 0:
                rows[target, size] = row
                size += 1
