"""Select the k best scores of each query, block of references by block (compiled).

Names and shapes in the kernels, for a block of b queries:

    scores[b, c], rows[b, c]      new scores and the rows of their references
    ids[R]                        ids of all references: equal scores are ordered by lower id
    kept[b, w], kept_rows[b, w]   buffer of each query, w = buffer_width(k); unordered
    counts[b]                     entries of the buffer that are in use
    least[b]                      score that a reference must reach to enter the buffer
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from s4g_ray.arrays import Floats32, Ints

Found = tuple[Ints, Floats32]  # ids[M, k] or rows[M, k], with scores[M, k]; best first
Parallel = Callable[[Callable[[slice], None], int], None]  # run a function on slices of a count
CHUNK = 32  # scores that are compared with the threshold at once


class TopK:
    """The k best references found so far, for each of a block of queries."""

    def __init__(self, num_queries: int, k: int, ids: Ints, parallel: Parallel) -> None:
        self.k = k
        self._ids = ids
        self._parallel = parallel
        self._rows = np.empty((num_queries, buffer_width(k)), np.int64)
        self._scores = np.empty(self._rows.shape, np.float32)
        self._counts = np.zeros(num_queries, np.int64)
        self._least = np.full(num_queries, -np.inf, np.float32)

    def fold(self, scores: Floats32, rows: Ints) -> None:
        """Take in scores[b, c] of references rows[b or 1, c]."""
        all_rows = np.broadcast_to(rows, scores.shape)
        self._parallel(lambda part: self.fold_part(part, scores[part], all_rows[part]), len(scores))

    def fold_part(self, part: slice, scores: Floats32, rows: Ints) -> None:
        """Take in scores and rows of the queries in `part`."""
        _fold(
            scores,
            rows,
            self._ids,
            self.k,
            self._scores[part],
            self._rows[part],
            self._counts[part],
            self._least[part],
        )

    def sorted(self) -> Found:
        """Return rows[b, k], scores[b, k], best first; k references at least were taken in."""
        self._parallel(self._sort_part, len(self._rows))
        return self._rows[:, : self.k].copy(), self._scores[:, : self.k].copy()

    def _sort_part(self, part: slice) -> None:
        _sort(self._ids, self.k, self._scores[part], self._rows[part], self._counts[part])


def buffer_width(k: int) -> int:
    """Return the number of entries in a query's buffer, from which its k best are selected."""
    return 2 * k + 2 * CHUNK


def order_ties(ids: Ints, scores: Floats32) -> Found:
    """Order equal scores by lower id, in place: ids[M, k], scores[M, k], best first."""
    tied = np.flatnonzero((scores[:, 1:] >= scores[:, :-1]).any(axis=1))
    if len(tied):
        order = np.lexsort((ids[tied], -scores[tied]), axis=-1)
        ids[tied] = np.take_along_axis(ids[tied], order, axis=1)
        scores[tied] = np.take_along_axis(scores[tied], order, axis=1)
    return ids, scores


@numba.njit(cache=True, nogil=True)
def _fold(
    scores: Floats32,
    rows: Ints,
    ids: Ints,
    k: int,
    kept: Floats32,
    kept_rows: Ints,
    counts: Ints,
    least: Floats32,
) -> None:  # pragma: no cover (compiled)
    """Take scores[b, c] of references rows[b, c] into kept[b, w], kept_rows[b, w], w >= k + CHUNK.

    The first counts[b] entries are in use. When they fill up, the k best move to the front and the
    k-th becomes least[b], which a score must reach from then on. Takes half the time of a heap of
    the k best.
    """
    num_columns = scores.shape[1]
    width = kept.shape[1]
    for i in range(len(scores)):
        row = scores[i]
        kept_scores = kept[i]
        kept_row = kept_rows[i]
        count = counts[i]
        threshold = least[i]
        for start in range(0, num_columns, CHUNK):
            stop = min(start + CHUNK, num_columns)
            num_reached = np.int32(0)
            for j in range(start, stop):  # vectorised: hardly any chunk has a score that counts
                num_reached += np.int32(1) if row[j] >= threshold else np.int32(0)
            if num_reached == 0:
                continue
            if count + num_reached > width:
                _select(kept_scores, kept_row, ids, count, k)
                count = k
                threshold = kept_scores[k - 1]
            for j in range(start, stop):
                if row[j] >= threshold:
                    kept_scores[count] = row[j]
                    kept_row[count] = rows[i, j]
                    count += 1
        counts[i] = count
        least[i] = threshold


@numba.njit(cache=True, nogil=True)
def _select(
    scores: Floats32, rows: Ints, ids: Ints, count: int, k: int
) -> None:  # pragma: no cover (compiled)
    """Bring the k best of the first `count` entries to the front, the k-th to its final position.

    Hoare's selection.
    """
    low = 0
    high = count - 1
    while low < high:
        middle = (low + high) >> 1
        pivot = scores[middle]
        pivot_id = ids[rows[middle]]
        i = low
        j = high
        while i <= j:
            while scores[i] > pivot or (scores[i] == pivot and ids[rows[i]] < pivot_id):
                i += 1
            while scores[j] < pivot or (scores[j] == pivot and ids[rows[j]] > pivot_id):
                j -= 1
            if i <= j:
                scores[i], scores[j] = scores[j], scores[i]
                rows[i], rows[j] = rows[j], rows[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            return


@numba.njit(cache=True, nogil=True)
def _sink(
    scores: Floats32, rows: Ints, ids: Ints, at: int, size: int, score: float, row: int
) -> None:  # pragma: no cover (compiled)
    """Put (score, row) into a heap of `size` entries, from the free position `at` downwards.

    The worst entry is at the root.
    """
    own_id = ids[row]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size:
            left = scores[child]
            right = scores[child + 1]
            if right < left or (right == left and ids[rows[child + 1]] > ids[rows[child]]):
                child += 1
        if scores[child] > score or (scores[child] == score and ids[rows[child]] < own_id):
            break
        scores[at] = scores[child]
        rows[at] = rows[child]
        at = child
    scores[at] = score
    rows[at] = row


@numba.njit(cache=True, nogil=True)
def _sort(
    ids: Ints, k: int, scores: Floats32, rows: Ints, counts: Ints
) -> None:  # pragma: no cover (compiled)
    """Bring the k best of the first counts[b] entries to the front, best first (heap sort)."""
    for i in range(len(scores)):
        _select(scores[i], rows[i], ids, counts[i], k)
        best = scores[i, :k]
        best_rows = rows[i, :k]
        for at in range(len(best) // 2 - 1, -1, -1):
            _sink(best, best_rows, ids, at, len(best), best[at], best_rows[at])
        for last in range(len(best) - 1, 0, -1):
            score = best[last]
            row = best_rows[last]
            best[last] = best[0]
            best_rows[last] = best_rows[0]
            _sink(best, best_rows, ids, 0, last, score, row)
