"""Find the first references of each query exactly, while a gallery is read part by part.

The float32 scores of a block give candidates, within a bound of their error, which are compared in
float64. No row of scores is sorted: a compiled kernel keeps a short list of each query, and passes
over scores that are below it.
"""

from __future__ import annotations

import numba
import numpy as np

from s4g_ray.arrays import Bools, Floats32, Floats64, Ints
from s4g_ray.data.pairs import Pairs
from s4g_ray.evaluation.ranking import NEAR_TIE, TIE, Block, run_on_threads, score_pairs

CHUNK = 64  # scores that are compared with the limit at once
SPARE = 256  # near-ties at the end of a list that are compared one by one; beyond, all scores are


class TopReferences:
    """The `count` references that score highest for each of Q queries, their own left out.

    rows[Q, k]: of the gallery, best first, the earlier row of equal scores; -1 where there are
    fewer. scores[Q, k]: float64.
    """

    def __init__(self, num_queries: int, count: int) -> None:
        self.rows = np.full((num_queries, count), -1, np.int64)
        self.scores = np.full((num_queries, count), -np.inf)

    def add_block(self, block: Block, start: int, first: int, own: Pairs) -> None:
        """Take in a block of queries from row `start` on and of references from row `first` on.

        own: pairs of the block that are left out. Overwrites their scores in the block.
        """
        block.scores[own.rows, own.columns] = -np.inf
        size = len(block.queries)
        count = self.rows.shape[1]
        limits = (self.scores[start : start + size, -1] - NEAR_TIE).astype(np.float32)
        is_crowded = np.zeros(size, dtype=bool)
        found = run_on_threads(
            lambda begin, end: _list_candidates(
                begin, end, block.scores, limits, count, is_crowded
            ),
            size,
        )
        rows = [part[0] for part in found]
        columns = [part[1] for part in found]
        crowded = np.flatnonzero(is_crowded)
        if len(crowded):
            listed = _list_exactly(block, crowded, count, own)
            rows.append(listed.rows)
            columns.append(listed.columns)
        pairs = Pairs(np.concatenate(rows), np.concatenate(columns))
        scores = score_pairs(block.queries, block.references, pairs)
        self._merge(start + pairs.rows, first + pairs.columns, scores)

    def _merge(self, queries: Ints, rows: Ints, scores: Floats64) -> None:
        """Keep the best of the lists and of new candidates: a row and a score of queries[n]."""
        changed = np.unique(queries)
        if not len(changed):
            return
        count = self.rows.shape[1]
        all_queries = np.concatenate([np.repeat(changed, count), queries])
        all_rows = np.concatenate([self.rows[changed].ravel(), rows])
        all_scores = np.concatenate([self.scores[changed].ravel(), scores])
        order = np.lexsort((all_rows, -all_scores, all_queries))
        ordered = all_queries[order]
        position = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        kept = order[position < count]
        self.rows[changed] = all_rows[kept].reshape(-1, count)
        self.scores[changed] = all_scores[kept].reshape(-1, count)

    def first(self, count: int) -> TopReferences:
        """Return the lists of the first `count` references."""
        cut = TopReferences(len(self.rows), 0)
        cut.rows = self.rows[:, :count]
        cut.scores = self.scores[:, :count]
        return cut

    def insert(self, queries: Ints, rows: Ints, scores: Floats64, positions: Ints) -> TopReferences:
        """Return the lists with own references at known positions, from 0.

        queries[n], rows[n], scores[n], positions[n]: different ones for each query. Positions
        beyond the list are left out.
        """
        num_queries, count = self.rows.shape
        inside = positions < count
        at = (queries[inside], positions[inside])
        is_own = np.zeros((num_queries, count), dtype=bool)
        is_own[at] = True
        others = np.maximum(np.cumsum(~is_own, axis=1) - 1, 0)
        merged = TopReferences(num_queries, count)
        merged.rows = np.take_along_axis(self.rows, others, axis=1)
        merged.scores = np.take_along_axis(self.scores, others, axis=1)
        merged.rows[at] = rows[inside]
        merged.scores[at] = scores[inside]
        return merged


def _list_exactly(block: Block, crowded: Ints, count: int, own: Pairs) -> Pairs:
    """List the `count` best references of queries crowded[c] from all scores in float64.

    For queries to which very many references score alike. Of those that tie at the end of the
    list, the earlier rows are taken.
    """
    queries = block.queries[crowded].astype(np.float64)
    scores = queries @ block.references.astype(np.float64).T
    members = own.expand(crowded)
    scores[members.rows, members.columns] = -np.inf
    last = scores.shape[1] - min(count, scores.shape[1])
    rows = []
    columns = []
    for row, values in zip(crowded, scores, strict=True):
        limit = np.partition(values, last)[last]
        best = np.flatnonzero(values > limit + TIE)
        tied = np.flatnonzero((values >= limit - TIE) & (values <= limit + TIE))
        chosen = np.concatenate([best, tied[: count - len(best)]])
        chosen = chosen[np.isfinite(values[chosen])]
        rows.append(np.full(len(chosen), row))
        columns.append(chosen)
    return Pairs(np.concatenate(rows), np.concatenate(columns))


@numba.njit(cache=True, nogil=True)
def _list_candidates(
    start: int,
    stop: int,
    scores: Floats32,
    limits: Floats32,
    count: int,
    is_crowded: Bools,
) -> tuple[Ints, Ints]:  # pragma: no cover (compiled)
    """List the references that may be among the `count` best of queries start..stop.

    scores[b, R]; limits[b]: a score that must be reached; -inf is never listed. Returns rows[n] and
    columns[n]. A query with more than SPARE near-ties is marked in is_crowded[b], and not listed.
    """
    room = 2 * count + 2 * SPARE
    values = np.empty(room, np.float32)
    places = np.empty(room, np.int64)
    rows = np.empty(stop - start, np.int64)
    columns = np.empty(stop - start, np.int64)
    found = 0
    for i in range(start, stop):
        row = scores[i]
        limit = limits[i]
        size = 0
        for begin in range(0, len(row), CHUNK):
            end = min(begin + CHUNK, len(row))
            num_reached = np.int32(0)
            for j in range(begin, end):  # vectorised: hardly any chunk has a score that counts
                num_reached += np.int32(row[j] >= limit)
            if num_reached == 0:
                continue
            if size + num_reached > room:
                limit, size = _shorten(values, places, size, count, limit)
                if size > count + SPARE:
                    is_crowded[i] = True
                    break
            for j in range(begin, end):
                if row[j] >= limit and row[j] > -np.inf:
                    values[size] = row[j]
                    places[size] = j
                    size += 1
        if not is_crowded[i]:
            limit, size = _shorten(values, places, size, count, limit)
            is_crowded[i] = size > count + SPARE
        if is_crowded[i]:
            continue
        if found + size > len(rows):
            rows = _extend(rows, size)
            columns = _extend(columns, size)
        rows[found : found + size] = i
        columns[found : found + size] = places[:size]
        found += size
    return rows[:found], columns[:found]


@numba.njit(cache=True, nogil=True)
def _shorten(
    values: Floats32, places: Ints, size: int, count: int, limit: np.float32
) -> tuple[np.float32, int]:  # pragma: no cover (compiled)
    """Drop what cannot be among the `count` best of values[size]; return limit and new size.

    Moves the others of values and places to the front.
    """
    if size <= count:
        return limit, size
    last = np.partition(values[:size], size - count)[size - count]
    limit = max(limit, np.float32(last - 2 * NEAR_TIE))
    kept = 0
    for j in range(size):
        if values[j] >= limit:
            values[kept] = values[j]
            places[kept] = places[j]
            kept += 1
    return limit, kept


@numba.njit(cache=True, nogil=True)
def _extend(values: Ints, min_room: int) -> Ints:  # pragma: no cover (compiled)
    """Return a copy with room for as many more, and at least `min_room`."""
    longer = np.empty(2 * len(values) + min_room, np.int64)
    longer[: len(values)] = values
    return longer
