"""Exact ranks of a block of queries: float32 scores of everything, float64 where two are too close to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from s4g_ray.arrays import Floats, Floats32, Floats64, Ints, by_rows
from s4g_ray.data.pairs import Pairs
from s4g_ray.errors import RunError

Result = TypeVar("Result")
NEAR_TIE = 1e-5  # scores closer than this are compared in float64: float32 products differ by their place in a block
TIE = 1e-12  # scores this close in float64 are equal: sums of equal vectors may differ in the last bits
THRESHOLDS_AT_ONCE = 2048
CLOSE_AT_MOST = 2048  # near-ties of a threshold that are looked at one by one
PAIRS_PER_CHUNK = 8192
SMALLEST = float(np.finfo(np.float32).tiny)  # norm of a vector of zeros, which is near none
RUNGS = 1024  # of a ladder from which a score finds its place among thresholds
COLUMNS_AT_ONCE = (
    512  # scores that stay in a core's first cache while all thresholds of a row look at them
)


def normalise(embeddings: Floats, places: Ints, what: str, first: int = 0) -> Floats32:
    """L2-normalised float32 rows; `first` is the number of the first for the error."""
    if embeddings.ndim != 2 or len(embeddings) != len(places):
        raise ValueError(
            f"{what} embeddings have shape {embeddings.shape}, for {len(places)} places"
        )
    unit = np.array(embeddings, np.float32, order="C")
    norms = np.empty(len(unit))
    _on_threads(lambda a, b: _normalise(a, b, unit, norms), len(unit))
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise RunError(
            f"{len(bad)} {what} embeddings are not finite; the first is row {first + bad[0]}"
        )
    return unit


class Block:
    """Some queries against all references: unit vectors [b, D] and [R, D], and their float32 scores [b, R].

    The scores are put into the first b rows of `buffer`, which the next block may use again.
    """

    def __init__(
        self,
        queries: Floats32,
        references: Floats32,
        buffer: Floats32,
    ) -> None:
        import torch  # not at the top: opening a data set takes pairs_by_place from here

        self.queries, self.references, self.scores = queries, references, buffer[: len(queries)]
        # by torch: 320 GFLOP/s where numpy's BLAS gave 285, and into memory that is there
        q, r, out = map(torch.from_numpy, (queries, references, self.scores))
        torch.mm(q, r.T, out=out)

    def top(self) -> Ints:
        """The reference that scores highest for each query; the first of equal ones."""
        if not len(self.references):
            return np.zeros(len(self.queries), np.int64)
        return np.concatenate(
            _on_threads(lambda a, b: self.scores[a:b].argmax(axis=1), len(self.queries))
        )

    def exact(self, pairs: Pairs) -> Floats64:
        """Scores of pairs in float64."""
        scores = np.empty(len(pairs.rows))
        _on_threads(
            lambda a, b: _exact(
                a, b, self.queries, self.references, pairs.rows, pairs.columns, scores
            ),
            len(scores),
        )
        return scores

    def best(self, pairs: Pairs) -> Floats64:
        """For each of the b queries its highest exact score among its pairs; minus infinity without any."""
        rough = self.scores[pairs.rows, pairs.columns]
        highest = np.full(len(self.queries), -np.inf)
        np.maximum.at(highest, pairs.rows, rough)
        close = rough >= highest[pairs.rows] - 2 * NEAR_TIE
        best = np.full(len(self.queries), -np.inf)
        np.maximum.at(
            best, pairs.rows[close], self.exact(Pairs(pairs.rows[close], pairs.columns[close]))
        )
        return best

    def best_ranks(self, pairs: Pairs) -> Ints:
        """[2, b]: the rank of each query's best pair among references that are not among its pairs; 0 without any."""
        best = self.best(pairs)
        rows = np.flatnonzero(np.isfinite(best))
        ranks = np.zeros((2, len(best)), np.int64)
        ranks[:, rows] = 1 + self.count_above(rows, best[rows], pairs)
        return ranks

    def count_above(self, rows: Ints, thresholds: Floats64, members: Pairs) -> Ints:
        """[2, p]: references that are no members of rows[p] and score at least (strict) or above (paper) a threshold.

        members are pairs of the block's rows.
        """
        above = np.zeros((2, len(rows)), np.int64)
        for start in range(0, len(rows), THRESHOLDS_AT_ONCE):
            part = slice(start, start + THRESHOLDS_AT_ONCE)
            above[:, part] = self._count_above(
                rows[part], thresholds[part], members.expand(rows[part])
            )
        return above

    def _count_above(self, rows: Ints, thresholds: Floats64, ours: Pairs) -> Ints:
        """As count_above; `ours` are the members as pairs of rows[p]."""
        low, high = (
            (thresholds - NEAR_TIE).astype(np.float32),
            (thresholds + NEAR_TIE).astype(np.float32),
        )
        clear, close = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        found = _on_threads(
            lambda first, last: _scan(
                first, last, self.scores, rows, low, high, CLOSE_AT_MOST, clear, close
            ),
            len(rows),
        )
        clearly = self.scores[rows[ours.rows], ours.columns] > high[ours.rows]
        clear -= np.bincount(ours.rows[clearly], minlength=len(rows))
        above = np.stack([clear, clear])
        crowded = np.flatnonzero(close > CLOSE_AT_MOST)
        which, columns = (np.concatenate(parts) for parts in zip(*found, strict=True))
        few = close[which] <= CLOSE_AT_MOST
        which, columns = which[few], columns[few]
        keys = which * self.scores.shape[1] + columns
        others = ~np.isin(keys, ours.rows * self.scores.shape[1] + ours.columns, assume_unique=True)
        which, columns = which[others], columns[others]
        exact = self.exact(Pairs(rows[which], columns))
        for at, counts in enumerate(
            (exact >= thresholds[which] - TIE, exact > thresholds[which] + TIE)
        ):
            above[at] += np.bincount(which[counts], minlength=len(rows))
        if len(crowded):
            above[:, crowded] = self._count_all(
                rows[crowded], thresholds[crowded], ours.expand(crowded)
            )
        return above

    def _count_all(self, rows: Ints, thresholds: Floats64, ours: Pairs) -> Ints:
        """As _count_above, from all scores in float64: for queries that see hardly any differences."""
        unique, at = np.unique(rows, return_inverse=True)
        scores = np.empty((len(unique), len(self.references)))
        for start in range(0, len(self.references), PAIRS_PER_CHUNK):
            chunk = slice(start, start + PAIRS_PER_CHUNK)
            scores[:, chunk] = (
                self.queries[unique].astype(np.float64)
                @ self.references[chunk].astype(np.float64).T
            )
        above = np.zeros((2, len(rows)), np.int64)
        ends = np.searchsorted(ours.rows, np.arange(len(rows) + 1))
        for i, threshold in enumerate(thresholds):
            row, own = scores[at[i]], ours.columns[ends[i] : ends[i + 1]]
            for protocol, least in enumerate(
                (threshold - TIE, np.nextafter(threshold + TIE, np.inf))
            ):
                above[protocol, i] = np.count_nonzero(row >= least) - np.count_nonzero(
                    row[own] >= least
                )
        return above


def _on_threads(function: Callable[[int, int], Result], count: int) -> list[Result]:
    """by_rows with as many threads as torch has."""
    import torch

    return by_rows(function, count, torch.get_num_threads())


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _normalise(
    first: int, last: int, rows: Floats32, norms: Floats64
) -> None:  # pragma: no cover (compiled)
    """Divide rows first..last by their norms, in float64: squares may leave float32's range."""
    for i in range(first, last):
        total = 0.0
        for value in rows[i]:
            total += np.float64(value) * np.float64(value)
        norms[i] = np.sqrt(total)
        divisor = max(norms[i], SMALLEST)
        for j in range(rows.shape[1]):
            rows[i, j] = rows[i, j] / divisor


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _exact(
    first: int,
    last: int,
    queries: Floats32,
    references: Floats32,
    rows: Ints,
    columns: Ints,
    scores: Floats64,
) -> None:  # pragma: no cover (compiled)
    """The inner products of pairs first..last in float64."""
    for i in range(first, last):
        query, reference, total = queries[rows[i]], references[columns[i]], 0.0
        for j in range(len(query)):
            total += np.float64(query[j]) * np.float64(reference[j])
        scores[i] = total


@numba.njit(cache=True, nogil=True)
def _scan(
    first: int,
    last: int,
    scores: Floats32,
    rows: Ints,
    low: Floats32,
    high: Floats32,
    most: int,
    above: Ints,
    near: Ints,
) -> tuple[Ints, Ints]:  # pragma: no cover (compiled)
    """Of thresholds first..last, each of one of rows[p], ascending: count the scores above high, and within low..high.

    The latter also as pairs which[n] of a threshold, columns[n]; incomplete where there are more than `most`.
    """
    which, columns, found = np.empty(last - first, np.int64), np.empty(last - first, np.int64), 0
    start = first
    while start < last:
        row, stop = scores[rows[start]], start
        while stop < last and rows[stop] == rows[start]:
            stop += 1
        order = start + np.argsort(high[start:stop], kind="mergesort")
        order = order[
            np.argsort(low[order], kind="mergesort")
        ]  # both ascend, as thresholds may differ in one alone
        lows, highs, clear = low[order], high[order], np.zeros(len(order) + 1, np.int64)
        ladder = _ladder(lows)
        for begin in range(0, len(row), COLUMNS_AT_ONCE):
            part = row[begin : begin + COLUMNS_AT_ONCE]
            if len(order) == 1:
                over, within = _count(part, lows[0], highs[0])
                clear[1] += over
                if within == 0:
                    continue
            elif sum(_count(part, lows[0], lows[0])) == 0:
                continue
            if found + len(order) * len(part) > len(which):
                which = _longer(which, len(order) * len(part))
                columns = _longer(columns, len(order) * len(part))
            for column in range(len(part)):
                score = part[column]
                if score < lows[0] or (len(order) == 1 and score > highs[0]):
                    continue
                at = _step(ladder, lows, score)
                while at > 0 and score <= highs[at - 1]:
                    at -= 1
                    near[order[at]] += 1
                    if near[order[at]] <= most:
                        which[found], columns[found] = order[at], begin + column
                        found += 1
                clear[at] += 1
        total = np.int64(0)
        for at in range(
            len(order) - 1, -1, -1
        ):  # what is above a threshold is above all lower ones
            total += clear[at + 1]
            above[order[at]] += total
        start = stop
    return which[:found], columns[:found]


@numba.njit(cache=True, nogil=True)
def _ladder(lows: Floats32) -> Ints:  # pragma: no cover (compiled)
    """For RUNGS equal steps from the least of lows[n], ascending, to the greatest: how many lie below each."""
    rungs, at = np.empty(RUNGS, np.int64), 0
    height = np.float64(lows[-1]) - np.float64(lows[0])
    for rung in range(RUNGS):
        while at < len(lows) and lows[at] < lows[0] + height * rung / RUNGS:
            at += 1
        rungs[rung] = at
    return rungs


@numba.njit(cache=True, nogil=True)
def _step(ladder: Ints, lows: Floats32, score: np.float32) -> Any:  # pragma: no cover (compiled)
    """How many of lows[n], ascending, a score reaches that reaches the least of them."""
    height = np.float64(lows[-1]) - np.float64(lows[0])
    rung = int((np.float64(score) - np.float64(lows[0])) * RUNGS / height) if height > 0 else 0
    at = max(ladder[min(rung, RUNGS - 1)] - 1, 0)  # a step down, for what is rounded
    while at > 0 and lows[at] > score:
        at -= 1
    while at < len(lows) and lows[at] <= score:
        at += 1
    return at


@numba.njit(cache=True, nogil=True)
def _count(
    scores: Floats32, low: np.float32, high: np.float32
) -> tuple[np.int32, np.int32]:  # pragma: no cover (compiled)
    """How many scores lie above high, and how many within low..high."""
    over = reach = np.int32(
        0
    )  # vectorised as it stands: 4.8 scores a nanosecond, 1.0 as a loop over the scores
    for column in range(len(scores)):
        over += np.int32(scores[column] > high)
        reach += np.int32(scores[column] >= low)
    return over, np.int32(reach - over)


@numba.njit(cache=True, nogil=True)
def _longer(values: Ints, least: int) -> Ints:  # pragma: no cover (compiled)
    """A copy with room for as many more, and at least `least`."""
    longer = np.empty(len(values) + max(len(values), least), np.int64)
    longer[: len(values)] = values
    return longer
