"""Exact ranks of a block of queries: float32 scores of everything, float64 where two are too close to call."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from s4g_ray.errors import RunError

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]

NEAR_TIE = 1e-5  # scores closer than this are compared in float64: float32 products differ by their place in a block
TIE = 1e-12  # scores this close in float64 are equal: sums of equal vectors may differ in the last bits
THRESHOLDS_AT_ONCE = 2048
CLOSE_AT_MOST = 2048  # near-ties of a threshold that are looked at one by one
PAIRS_PER_CHUNK = 8192


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


def normalise(embeddings: Floats, places: Ints, what: str, first: int = 0) -> NDArray[np.float32]:
    """L2-normalised float32 rows; `first` is the number of the first for the error."""
    if embeddings.ndim != 2 or len(embeddings) != len(places):
        raise ValueError(f"{what} embeddings have shape {embeddings.shape}, for {len(places)} places")
    unit = embeddings.astype(np.float32)
    for start in range(0, len(unit), PAIRS_PER_CHUNK):
        rows = unit[start : start + PAIRS_PER_CHUNK]
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise RunError(f"{len(bad)} {what} embeddings are not finite; the first is row {first + start + bad[0]}")
        norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)  # squares may leave float32's range
        rows[:] = rows / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit


class Block:
    """Some queries against all references: unit vectors [b, D] and [R, D], and their float32 scores [b, R]."""

    def __init__(self, queries: NDArray[np.float32], references: NDArray[np.float32]) -> None:
        self.queries, self.references = queries, references
        self.scores: NDArray[np.float32] = queries @ references.T

    def exact(self, pairs: Pairs) -> NDArray[np.float64]:
        """Scores of pairs in float64."""
        scores = np.empty(len(pairs.rows))
        for start in range(0, len(scores), PAIRS_PER_CHUNK):
            chunk = slice(start, start + PAIRS_PER_CHUNK)
            product = self.queries[pairs.rows[chunk]].astype(np.float64) * self.references[pairs.columns[chunk]]
            scores[chunk] = product.sum(axis=1)
        return scores

    def best(self, pairs: Pairs) -> NDArray[np.float64]:
        """For each of the b queries its highest exact score among its pairs; minus infinity without any."""
        rough = self.scores[pairs.rows, pairs.columns]
        highest = np.full(len(self.queries), -np.inf)
        np.maximum.at(highest, pairs.rows, rough)
        close = rough >= highest[pairs.rows] - 2 * NEAR_TIE
        best = np.full(len(self.queries), -np.inf)
        np.maximum.at(best, pairs.rows[close], self.exact(Pairs(pairs.rows[close], pairs.columns[close])))
        return best

    def best_ranks(self, pairs: Pairs) -> Ints:
        """[2, b]: the rank of each query's best pair among references that are not among its pairs; 0 without any."""
        best = self.best(pairs)
        rows = np.flatnonzero(np.isfinite(best))
        ranks = np.zeros((2, len(best)), np.int64)
        ranks[:, rows] = 1 + self.count_above(rows, best[rows], pairs)
        return ranks

    def count_above(self, rows: Ints, thresholds: NDArray[np.float64], members: Pairs) -> Ints:
        """[2, p]: references that are no members of rows[p] and score at least (strict) or above (paper) a threshold.

        members are pairs of the block's rows.
        """
        above = np.zeros((2, len(rows)), np.int64)
        for start in range(0, len(rows), THRESHOLDS_AT_ONCE):
            part = slice(start, start + THRESHOLDS_AT_ONCE)
            above[:, part] = self._count_above(rows[part], thresholds[part], members.expand(rows[part]))
        return above

    def _count_above(self, rows: Ints, thresholds: NDArray[np.float64], ours: Pairs) -> Ints:
        """As count_above; `ours` are the members as pairs of rows[p]."""
        low, high = (thresholds - NEAR_TIE).astype(np.float32), (thresholds + NEAR_TIE).astype(np.float32)
        clear, close = _count(self.scores, rows, low, high)
        clearly = self.scores[rows[ours.rows], ours.columns] > high[ours.rows]
        clear -= np.bincount(ours.rows[clearly], minlength=len(rows))
        above = np.stack([clear, clear])
        crowded = np.flatnonzero(close > CLOSE_AT_MOST)
        close[crowded] = 0
        which, columns = _collect(self.scores, rows, low, high, close)
        keys = which * self.scores.shape[1] + columns
        others = ~np.isin(keys, ours.rows * self.scores.shape[1] + ours.columns)
        which, columns = which[others], columns[others]
        exact = self.exact(Pairs(rows[which], columns))
        for at, counts in enumerate((exact >= thresholds[which] - TIE, exact > thresholds[which] + TIE)):
            above[at] += np.bincount(which[counts], minlength=len(rows))
        if len(crowded):
            above[:, crowded] = self._count_all(rows[crowded], thresholds[crowded], ours.expand(crowded))
        return above

    def _count_all(self, rows: Ints, thresholds: NDArray[np.float64], ours: Pairs) -> Ints:
        """As _count_above, from all scores in float64: for queries that see hardly any differences."""
        unique, at = np.unique(rows, return_inverse=True)
        scores = np.empty((len(unique), len(self.references)))
        for start in range(0, len(self.references), PAIRS_PER_CHUNK):
            chunk = slice(start, start + PAIRS_PER_CHUNK)
            scores[:, chunk] = self.queries[unique].astype(np.float64) @ self.references[chunk].astype(np.float64).T
        above = np.zeros((2, len(rows)), np.int64)
        ends = np.searchsorted(ours.rows, np.arange(len(rows) + 1))
        for i, threshold in enumerate(thresholds):
            row, own = scores[at[i]], ours.columns[ends[i] : ends[i + 1]]
            for protocol, least in enumerate((threshold - TIE, np.nextafter(threshold + TIE, np.inf))):
                above[protocol, i] = np.count_nonzero(row >= least) - np.count_nonzero(row[own] >= least)
        return above


@numba.njit(cache=True)
def _count(
    scores: NDArray[np.float32], rows: Ints, low: NDArray[np.float32], high: NDArray[np.float32]
) -> tuple[Ints, Ints]:  # pragma: no cover (compiled)
    """For each of rows[p] how many scores lie above high, and how many within low..high."""
    above, near = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for i in range(len(rows)):
        row, least, most = scores[rows[i]], low[i], high[i]
        over = reach = np.int32(0)  # vectorised, unlike 64 bits: 1.8 against 0.95 scores a nanosecond
        for column in range(len(row)):
            over += np.int32(1) if row[column] > most else np.int32(0)
            reach += np.int32(1) if row[column] >= least else np.int32(0)
        above[i], near[i] = over, reach - over
    return above, near


@numba.njit(cache=True)
def _collect(
    scores: NDArray[np.float32], rows: Ints, low: NDArray[np.float32], high: NDArray[np.float32], near: Ints
) -> tuple[Ints, Ints]:  # pragma: no cover (compiled)
    """The columns of the near[p] scores within low..high of each of rows[p]: which[n] of them, columns[n]."""
    which, columns = np.empty(near.sum(), np.int64), np.empty(near.sum(), np.int64)
    at = 0
    for i in range(len(rows)):
        if near[i] == 0:
            continue
        row = scores[rows[i]]
        for column in range(len(row)):
            if low[i] <= row[column] <= high[i]:
                which[at], columns[at] = i, column
                at += 1
    return which, columns
