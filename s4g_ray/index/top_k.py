"""Compiled selection of the k best scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numba
import numpy as np

from s4g_ray.arrays import Floats32, Ints

if TYPE_CHECKING:
    pass

Found = tuple[Ints, Floats32]
Parallel = Callable[[Callable[[slice], None], int], None]
CHUNK = 32  # scores that are compared with the threshold at once


class TopK:
    """The k best references seen so far, for each of a block of queries."""

    def __init__(self, count: int, k: int, ids: Ints, parallel: Parallel) -> None:
        self.k, self._ids, self._parallel = k, ids, parallel
        self._rows = np.empty((count, buffer_width(k)), np.int64)
        self._scores = np.empty(self._rows.shape, np.float32)
        self._counts, self._least = np.zeros(count, np.int64), np.full(count, -np.inf, np.float32)

    def fold(self, scores: Floats32, rows: Ints) -> None:
        """Take in scores[b, c] of references rows[b or 1, c]."""
        every = np.broadcast_to(rows, scores.shape)
        self._parallel(lambda part: self.fold_part(part, scores[part], every[part]), len(scores))

    def fold_part(self, part: slice, scores: Floats32, rows: Ints) -> None:
        """Take in scores and rows of some of the queries."""
        state = self._scores[part], self._rows[part], self._counts[part], self._least[part]
        _fold(scores, rows, self._ids, self.k, *state)

    def sorted(self) -> Found:
        """rows[b, k], scores[b, k], best first; at least k references were taken in."""
        self._parallel(
            lambda part: _sort(
                self._ids, self.k, self._scores[part], self._rows[part], self._counts[part]
            ),
            len(self._rows),
        )
        return self._rows[:, : self.k].copy(), self._scores[:, : self.k].copy()


def buffer_width(k: int) -> int:
    """Entries that a query's k best are chosen from."""
    return 2 * k + 2 * CHUNK


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

    The first counts[b] of them are in use. When they fill up, the k best stay, at the front, and the k-th is the
    least[b] that a score must reach from then on. Half the time that a heap of the k best takes.
    """
    columns, width = scores.shape[1], kept.shape[1]
    for i in range(len(scores)):
        row, ours, our_rows, count, reached = scores[i], kept[i], kept_rows[i], counts[i], least[i]
        for start in range(0, columns, CHUNK):
            stop, reach = min(start + CHUNK, columns), np.int32(0)
            for j in range(start, stop):  # vectorised: hardly any chunk holds a score that counts
                reach += np.int32(1) if row[j] >= reached else np.int32(0)
            if reach == 0:
                continue
            if count + reach > width:
                _select(ours, our_rows, ids, count, k)
                count, reached = k, ours[k - 1]
            for j in range(start, stop):
                if row[j] >= reached:
                    ours[count], our_rows[count] = row[j], rows[i, j]
                    count += 1
        counts[i], least[i] = count, reached


@numba.njit(cache=True, nogil=True)
def _select(
    scores: Floats32, rows: Ints, ids: Ints, count: int, k: int
) -> None:  # pragma: no cover (compiled)
    """Bring the k best of the first `count` entries to the front, the k-th in its place (Hoare's selection)."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) >> 1
        pivot, pivot_id = scores[middle], ids[rows[middle]]
        i, j = low, high
        while i <= j:
            while scores[i] > pivot or (scores[i] == pivot and ids[rows[i]] < pivot_id):
                i += 1
            while scores[j] < pivot or (scores[j] == pivot and ids[rows[j]] > pivot_id):
                j -= 1
            if i <= j:
                scores[i], scores[j] = scores[j], scores[i]
                rows[i], rows[j] = rows[j], rows[i]
                i, j = i + 1, j - 1
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
    """Put an entry into a heap of `size`, the worst at its root, from the hole `at` downwards."""
    own = ids[row]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size:
            left, right = scores[child], scores[child + 1]
            if right < left or (right == left and ids[rows[child + 1]] > ids[rows[child]]):
                child += 1
        if scores[child] > score or (scores[child] == score and ids[rows[child]] < own):
            break
        scores[at], rows[at] = scores[child], rows[child]
        at = child
    scores[at], rows[at] = score, row


@numba.njit(cache=True, nogil=True)
def _sort(
    ids: Ints, k: int, scores: Floats32, rows: Ints, counts: Ints
) -> None:  # pragma: no cover (compiled)
    """Bring the k best of the first counts[b] of scores[b, w], rows[b, w] to the front, best first (heap sort)."""
    for i in range(len(scores)):
        _select(scores[i], rows[i], ids, counts[i], k)
        ours, our_rows = scores[i, :k], rows[i, :k]
        for at in range(len(ours) // 2 - 1, -1, -1):
            _sink(ours, our_rows, ids, at, len(ours), ours[at], our_rows[at])
        for last in range(len(ours) - 1, 0, -1):
            score, row = ours[last], our_rows[last]
            ours[last], our_rows[last] = ours[0], our_rows[0]
            _sink(ours, our_rows, ids, 0, last, score, row)
