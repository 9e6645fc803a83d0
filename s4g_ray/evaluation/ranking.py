"""Rank references for a block of queries exactly: float32 scores, float64 where two nearly tie.

Block holds the scores of some queries against some references. For a threshold, the score of one of
a query's own references, it counts the other references that score at least as high. Compiled
kernels count in float32 and list the near-ties, which are then compared in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from s4g_ray.arrays import Floats, Floats32, Floats64, Ints, by_rows
from s4g_ray.data.pairs import Pairs
from s4g_ray.errors import RunError

Result = TypeVar("Result")
# Scores closer than this are compared in float64: float32 products differ by their position in a
# block.
NEAR_TIE = 1e-5
# Scores this close in float64 are equal: sums of equal vectors may differ in the last bits.
TIE = 1e-12
THRESHOLDS_AT_ONCE = 2048
MAX_NEAR_TIES = 2048  # of a threshold that are compared one by one; beyond, all its scores are
PAIRS_PER_CHUNK = 8192
SMALLEST_NORM = float(np.finfo(np.float32).tiny)  # divides a vector of zeros, which is near none
NUM_RUNGS = 1024  # of the ladder by which a score finds its position among thresholds
# Scores that stay in a core's first cache while all thresholds of a row are compared with them.
COLUMNS_AT_ONCE = 512


def normalise(embeddings: Floats, places: Ints, kind: str, first: int = 0) -> Floats32:
    """L2-normalise rows into float32.

    kind names the embeddings in errors, `first` is the number of the first row there. Raises
    ValueError when there is not one row for each place, RunError for rows that are not finite.
    """
    if embeddings.ndim != 2 or len(embeddings) != len(places):
        raise ValueError(
            f"{kind} embeddings have shape {embeddings.shape}, for {len(places)} places"
        )
    unit = np.array(embeddings, np.float32, order="C")
    norms = np.empty(len(unit))
    run_on_threads(lambda start, stop: _divide_by_norms(start, stop, unit, norms), len(unit))
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise RunError(
            f"{len(bad)} {kind} embeddings are not finite; the first is row {first + bad[0]}"
        )
    return unit


def score_pairs(queries: Floats32, references: Floats32, pairs: Pairs) -> Floats64:
    """Compute the scores of pairs in float64."""
    scores = np.empty(len(pairs.rows))

    def score_range(start: int, stop: int) -> None:
        _score_pairs(start, stop, queries, references, pairs.rows, pairs.columns, scores)

    run_on_threads(score_range, len(scores))
    return scores


class Block:
    """Queries against references: unit vectors [b, D] and [R, D], float32 scores [b, R].

    The scores are written to `buffer` [b, R], which the next block may use again.
    """

    def __init__(
        self,
        queries: Floats32,
        references: Floats32,
        buffer: Floats32,
    ) -> None:
        import torch  # not at the top: it takes seconds to import

        self.queries = queries
        self.references = references
        self.scores = buffer
        # by torch: 320 GFLOP/s where numpy's BLAS gave 285, and into memory that is there
        left = torch.from_numpy(self.queries)
        right = torch.from_numpy(self.references).T
        torch.mm(left, right, out=torch.from_numpy(self.scores))

    def find_top(self) -> Ints:
        """Find the reference that scores highest for each query; the first of equal ones."""
        if not len(self.references):
            return np.zeros(len(self.queries), np.int64)
        parts = run_on_threads(
            lambda start, stop: self.scores[start:stop].argmax(axis=1), len(self.queries)
        )
        return np.concatenate(parts)

    def count_above(self, rows: Ints, thresholds: Floats64, members: Pairs) -> Ints:
        """Count the references that reach thresholds[p] of rows[p] and are no members of the row.

        Returns counts[2, p]: scores at least as high (strict), and higher ones (paper). members are
        pairs of the block's rows.
        """
        above = np.zeros((2, len(rows)), np.int64)
        for start in range(0, len(rows), THRESHOLDS_AT_ONCE):
            part = slice(start, start + THRESHOLDS_AT_ONCE)
            own = members.expand(rows[part])
            above[:, part] = self._count_above(rows[part], thresholds[part], own)
        return above

    def _count_above(self, rows: Ints, thresholds: Floats64, own: Pairs) -> Ints:
        """Count as count_above does; `own` are the members as pairs of an index p and a column."""
        low = (thresholds - NEAR_TIE).astype(np.float32)
        high = (thresholds + NEAR_TIE).astype(np.float32)
        num_clear = np.zeros(len(rows), np.int64)
        num_close = np.zeros(len(rows), np.int64)

        def scan(start: int, stop: int) -> tuple[Ints, Ints]:
            return _scan_scores(
                start, stop, self.scores, rows, low, high, MAX_NEAR_TIES, num_clear, num_close
            )

        found = run_on_threads(scan, len(rows))
        is_clear = self.scores[rows[own.rows], own.columns] > high[own.rows]
        num_clear -= np.bincount(own.rows[is_clear], minlength=len(rows))
        above = np.stack([num_clear, num_clear])
        indices = np.concatenate([part[0] for part in found])
        columns = np.concatenate([part[1] for part in found])
        listed = num_close[indices] <= MAX_NEAR_TIES
        indices = indices[listed]
        columns = columns[listed]
        num_references = self.scores.shape[1]
        keys = indices * num_references + columns
        own_keys = own.rows * num_references + own.columns
        is_other = ~np.isin(keys, own_keys, assume_unique=True)
        indices = indices[is_other]
        columns = columns[is_other]
        exact = score_pairs(self.queries, self.references, Pairs(rows[indices], columns))
        at_least = exact >= thresholds[indices] - TIE
        higher = exact > thresholds[indices] + TIE
        above[0] += np.bincount(indices[at_least], minlength=len(rows))
        above[1] += np.bincount(indices[higher], minlength=len(rows))
        crowded = np.flatnonzero(num_close > MAX_NEAR_TIES)
        if len(crowded):
            above[:, crowded] = self._count_exactly(
                rows[crowded], thresholds[crowded], own.expand(crowded)
            )
        return above

    def _count_exactly(self, rows: Ints, thresholds: Floats64, own: Pairs) -> Ints:
        """Count as _count_above does, from all scores in float64.

        For queries to which nearly all references score alike.
        """
        unique, row_of = np.unique(rows, return_inverse=True)
        queries = self.queries[unique].astype(np.float64)
        scores = np.empty((len(unique), len(self.references)))
        for start in range(0, len(self.references), PAIRS_PER_CHUNK):
            chunk = slice(start, start + PAIRS_PER_CHUNK)
            scores[:, chunk] = queries @ self.references[chunk].astype(np.float64).T
        above = np.zeros((2, len(rows)), np.int64)
        ends = np.searchsorted(own.rows, np.arange(len(rows) + 1))
        for i, threshold in enumerate(thresholds):
            row = scores[row_of[i]]
            own_scores = row[own.columns[ends[i] : ends[i + 1]]]
            limits = (threshold - TIE, np.nextafter(threshold + TIE, np.inf))
            for protocol, limit in enumerate(limits):
                num_all = np.count_nonzero(row >= limit)
                num_own = np.count_nonzero(own_scores >= limit)
                above[protocol, i] = num_all - num_own
        return above


def run_on_threads(function: Callable[[int, int], Result], count: int) -> list[Result]:
    """Call by_rows with as many threads as torch has."""
    import torch

    return by_rows(function, count, torch.get_num_threads())


# The kernels below share these names:
#   start, stop                the range of rows, pairs or thresholds that a thread works on
#   queries[b, D], references[R, D], scores[b, R]   of a block
#   rows[p], low[p], high[p]   of p thresholds: the block's row, ascending; bounds of near-ties
#   num_above[p], num_near[p]  results: scores above high; scores within low..high
#   lows[n], highs[n]          low and high of the thresholds of one row, ascending
#   ladder[NUM_RUNGS]          for equal steps from lows[0] to lows[-1]: how many lows are below


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _divide_by_norms(
    start: int, stop: int, vectors: Floats32, norms: Floats64
) -> None:  # pragma: no cover (compiled)
    """Divide vectors start..stop by their norms, in float64: squares may leave float32's range."""
    for i in range(start, stop):
        total = 0.0
        for value in vectors[i]:
            total += np.float64(value) * np.float64(value)
        norms[i] = np.sqrt(total)
        divisor = max(norms[i], SMALLEST_NORM)
        for j in range(vectors.shape[1]):
            vectors[i, j] = vectors[i, j] / divisor


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _score_pairs(
    start: int,
    stop: int,
    queries: Floats32,
    references: Floats32,
    rows: Ints,
    columns: Ints,
    scores: Floats64,
) -> None:  # pragma: no cover (compiled)
    """Compute the inner products of pairs start..stop in float64."""
    for i in range(start, stop):
        query = queries[rows[i]]
        reference = references[columns[i]]
        total = 0.0
        for j in range(len(query)):
            total += np.float64(query[j]) * np.float64(reference[j])
        scores[i] = total


@numba.njit(cache=True, nogil=True)
def _scan_scores(
    start: int,
    stop: int,
    scores: Floats32,
    rows: Ints,
    low: Floats32,
    high: Floats32,
    max_near: int,
    num_above: Ints,
    num_near: Ints,
) -> tuple[Ints, Ints]:  # pragma: no cover (compiled)
    """Count, for thresholds start..stop, the scores above high and those within low..high.

    Returns the latter also as indices[n] of a threshold and columns[n]; incomplete for a threshold
    that has more than max_near.
    """
    indices = np.empty(stop - start, np.int64)
    columns = np.empty(stop - start, np.int64)
    found = 0
    first = start
    while first < stop:
        row = scores[rows[first]]
        last = first
        while last < stop and rows[last] == rows[first]:
            last += 1
        order = first + _sort_thresholds(low[first:last], high[first:last])
        lows = low[order]
        highs = high[order]
        clear = np.zeros(len(order) + 1, np.int64)
        ladder = _build_ladder(lows)
        for begin in range(0, len(row), COLUMNS_AT_ONCE):
            part = row[begin : begin + COLUMNS_AT_ONCE]
            if len(order) == 1:
                above, within = _count_above_and_within(part, lows[0], highs[0])
                clear[1] += above
                if within == 0:
                    continue
            elif sum(_count_above_and_within(part, lows[0], lows[0])) == 0:
                continue
            if found + len(order) * len(part) > len(indices):
                indices = _enlarge(indices, len(order) * len(part))
                columns = _enlarge(columns, len(order) * len(part))
            for column in range(len(part)):
                score = part[column]
                if score < lows[0] or (len(order) == 1 and score > highs[0]):
                    continue
                at = _count_reached(ladder, lows, score)
                while at > 0 and score <= highs[at - 1]:
                    at -= 1
                    num_near[order[at]] += 1
                    if num_near[order[at]] <= max_near:
                        indices[found] = order[at]
                        columns[found] = begin + column
                        found += 1
                clear[at] += 1
        _add_counts(clear, order, num_above)
        first = last
    return indices[:found], columns[:found]


@numba.njit(cache=True, nogil=True)
def _sort_thresholds(low: Floats32, high: Floats32) -> Ints:  # pragma: no cover (compiled)
    """Order thresholds so that low and high both ascend; they may differ in one of them alone."""
    order = np.argsort(high, kind="mergesort")
    return order[np.argsort(low[order], kind="mergesort")]


@numba.njit(cache=True, nogil=True)
def _add_counts(clear: Ints, order: Ints, num_above: Ints) -> None:  # pragma: no cover (compiled)
    """Add clear[n + 1] to num_above: scores above a threshold are above all lower ones too.

    clear[i] counts the scores that are above exactly i of the thresholds order[n].
    """
    total = np.int64(0)
    for at in range(len(order) - 1, -1, -1):
        total += clear[at + 1]
        num_above[order[at]] += total


@numba.njit(cache=True, nogil=True)
def _build_ladder(lows: Floats32) -> Ints:  # pragma: no cover (compiled)
    """Build the ladder of lows[n]: how many of them are below each of NUM_RUNGS equal steps."""
    ladder = np.empty(NUM_RUNGS, np.int64)
    at = 0
    height = np.float64(lows[-1]) - np.float64(lows[0])
    for rung in range(NUM_RUNGS):
        while at < len(lows) and lows[at] < lows[0] + height * rung / NUM_RUNGS:
            at += 1
        ladder[rung] = at
    return ladder


@numba.njit(cache=True, nogil=True)
def _count_reached(
    ladder: Ints, lows: Floats32, score: np.float32
) -> Any:  # pragma: no cover (compiled)
    """Count how many of lows[n] a score reaches, given that it reaches the first."""
    height = np.float64(lows[-1]) - np.float64(lows[0])
    rung = 0
    if height > 0:
        rung = int((np.float64(score) - np.float64(lows[0])) * NUM_RUNGS / height)
    at = max(ladder[min(rung, NUM_RUNGS - 1)] - 1, 0)  # a step down, against rounding
    while at > 0 and lows[at] > score:
        at -= 1
    while at < len(lows) and lows[at] <= score:
        at += 1
    return at


@numba.njit(cache=True, nogil=True)
def _count_above_and_within(
    scores: Floats32, low: np.float32, high: np.float32
) -> tuple[np.int32, np.int32]:  # pragma: no cover (compiled)
    """Count the scores above high, and those within low..high."""
    # vectorised in this form: 4.8 scores a nanosecond; as a loop over the scores 1.0
    above = np.int32(0)
    reached = np.int32(0)
    for column in range(len(scores)):
        above += np.int32(scores[column] > high)
        reached += np.int32(scores[column] >= low)
    return above, np.int32(reached - above)


@numba.njit(cache=True, nogil=True)
def _enlarge(values: Ints, min_room: int) -> Ints:  # pragma: no cover (compiled)
    """Return a copy with room for as many more, and at least `min_room`."""
    larger = np.empty(len(values) + max(len(values), min_room), np.int64)
    larger[: len(values)] = values
    return larger
