"""Retrieval metrics: exact ranks block by block, in both protocols, in memory O(block * R).

For every query a few scores matter: those of its own references, of its semi-positives, of the references
around it. They are computed in float64; how many references of others score as high is counted over a block
of float32 scores, and decided in float64 where the two are too close to call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from s4g_ray.errors import RunError
from s4g_ray.neighbors import EARTH_RADIUS_M, metres_between, unit_sphere

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Protocol = Literal["strict", "paper"]
PROTOCOLS: tuple[Protocol, Protocol] = ("strict", "paper")  # the order of the first axis of what is counted in both

BLOCK_SCORES = 16_000_000  # scores in one block of the matrix product: 64 MB
NEAR_TIE = 1e-5  # scores closer than this are compared in float64: float32 products differ by their place in a block
PAIRS_PER_CHUNK = 8192


@dataclass(frozen=True)
class Retrieval:
    """What each of Q queries found among R references; the first axis of [2, Q] is PROTOCOLS.

    top[Q]: the row of the reference that scores highest. ranks[2, Q]: the 1-based rank of a query's best own
    reference, 0 where it has none: `strict` counts references of others that score as high, `paper` only those
    that score higher. ap[2, Q]: average precision. hits, literal_hits[2, Q]: see retrieval_metrics; None without
    semi-positives. within: by radius in metres, ranks[2, Q] of the best reference in that radius. error_m[Q].
    """

    top: Ints
    ranks: Ints
    ap: NDArray[np.float64]
    num_references: int
    hits: Bools | None = None
    literal_hits: Bools | None = None
    within: dict[float, Ints] = field(default_factory=dict)
    error_m: NDArray[np.float64] | None = None

    def metrics(
        self, protocol: Protocol = "strict", *, ranks: Sequence[int] = (1, 5, 10), rows: Bools | None = None
    ) -> dict[str, float]:
        """The metrics of all queries or of some rows[Q]. Raises RunError when none of them has a reference."""
        at = PROTOCOLS.index(protocol)
        chosen = np.ones(len(self.top), dtype=bool) if rows is None else rows
        counted = chosen & (self.ranks[at] > 0)
        if not counted.any():
            raise RunError("no query has a reference in the gallery: nothing to evaluate")
        found = self.ranks[at, counted]
        values = {f"recall@{k}": (found <= k).mean() for k in ranks}
        values["recall@1%"] = (found <= max(1, self.num_references // 100)).mean()
        values["ap"] = self.ap[at, counted].mean()
        if self.hits is not None and self.literal_hits is not None:
            values["hit_rate"] = self.hits[at, counted].mean()
            values["hit_rate_literal"] = self.literal_hits[at, counted].mean()
        if self.error_m is not None:
            known = counted & np.isfinite(self.error_m)
            if known.any():
                for radius, near in self.within.items():
                    for k in ranks:
                        hit = (near[at, known] > 0) & (near[at, known] <= k)
                        values[f"recall@{k}_within_{radius:g}m"] = hit.mean()
                values["median_error_m"] = np.median(self.error_m[known])
        values["queries"] = counted.sum()
        values["queries_without_reference"] = chosen.sum() - counted.sum()
        values["references"] = self.num_references
        return {key: float(value) for key, value in values.items()}


def retrieval_metrics(
    query_embeddings: Floats,
    reference_embeddings: Floats,
    query_places: Ints,
    reference_places: Ints,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    semi_positives: Sequence[ArrayLike] | None = None,
    query_latlon: NDArray[np.float64] | None = None,
    reference_latlon: NDArray[np.float64] | None = None,
    radii_m: Sequence[float] = (25, 50, 100),
    protocol: Protocol = "strict",
    distractors: Bools | None = None,
) -> dict[str, float]:
    """Metrics by cosine: query_embeddings[Q, D], reference_embeddings[R, D], places [Q] and [R]; fractions in 0..1.

    - `recall@k`: the best own reference ranks k or better; `recall@1%`: k = max(1, R // 100). Several own
      references count by the best. A query without any is left out, and counted in `queries_without_reference`.
    - `ap`: mean average precision, in the trapezoid form of University-1652 (arXiv 2002.12186).
    - with semi_positives[Q] (lists of place_ids; VIGOR, arXiv 2011.12172): `hit_rate`, as published: all that
      rank above the own reference are semi-positives; `hit_rate_literal`: the first reference is own or
      semi-positive.
    - with latlon [Q, 2] and [R, 2] in degrees: `recall@k_within_50m` for each of radii_m: a reference at most that
      far from the query is among the first k, whatever its place; `median_error_m`: to the first reference.
      Both over queries with coordinates.

    `strict` lets ties count against the query and keeps everything in the gallery; `paper` lets ties count for
    it, and leaves distractors[R] out. Raises RunError for non-finite embeddings and when no query has a
    reference, ValueError for shapes that do not fit.
    """
    kept = slice(None) if protocol == "strict" or distractors is None else ~distractors
    found = retrieve(
        query_embeddings, reference_embeddings[kept], query_places, reference_places[kept],
        semi_positives=semi_positives, query_latlon=query_latlon,
        reference_latlon=None if reference_latlon is None else reference_latlon[kept], radii_m=radii_m,
    )  # fmt: skip
    return found.metrics(protocol, ranks=ranks)


def retrieve(
    query_embeddings: Floats,
    reference_embeddings: Floats,
    query_places: Ints,
    reference_places: Ints,
    *,
    semi_positives: Sequence[ArrayLike] | None = None,
    query_latlon: NDArray[np.float64] | None = None,
    reference_latlon: NDArray[np.float64] | None = None,
    radii_m: Sequence[float] = (25, 50, 100),
) -> Retrieval:
    """Search every query in the gallery, once for both protocols; arguments and errors as of retrieval_metrics."""
    references = _normalise(reference_embeddings, reference_places, "reference")
    if query_embeddings.ndim != 2 or len(query_embeddings) != len(query_places):
        raise ValueError(f"query embeddings have shape {query_embeddings.shape}, for {len(query_places)} places")
    if query_embeddings.shape[1] != references.shape[1]:
        raise ValueError(f"D differs: queries {query_embeddings.shape[1]}, references {references.shape[1]}")
    own = _pairs_by_place(np.arange(len(query_places)), query_places, reference_places)
    semi = None if semi_positives is None else _semi_pairs(semi_positives, query_places, reference_places)
    around = None
    if query_latlon is not None and reference_latlon is not None:
        around = _Around(query_latlon, reference_latlon, list(radii_m))
    count = len(query_places)
    top, ranks, ap = np.zeros(count, np.int64), np.zeros((2, count), np.int64), np.full((2, count), np.nan)
    hits, literal = np.zeros((2, count), bool), np.zeros((2, count), bool)
    within = {float(radius): np.zeros((2, count), np.int64) for radius in radii_m} if around else {}
    size = max(1, BLOCK_SCORES // max(len(references), 1))
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        block = _Block(_normalise(query_embeddings[rows], query_places[rows], "query", start), references)
        top[rows] = block.scores.argmax(axis=1) if len(references) else 0
        mine = own.take(rows)
        ranks[:, rows], ap[:, rows], best = _own_ranks(block, mine)
        if semi is not None:
            hits[:, rows], literal[:, rows] = _hits(block, mine, semi.take(rows), ranks[:, rows], best)
        for radius, near in around.pairs(rows) if around else ():
            within[radius][:, rows] = block.best_ranks(near)
    metres = around.metres(top) if around and len(references) else None
    some, literally = (hits, literal) if semi is not None else (None, None)
    return Retrieval(top, ranks, ap, len(references), some, literally, within, metres)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a query and a reference: rows[n], ascending, and columns[n]."""

    rows: Ints
    columns: Ints

    def take(self, rows: slice) -> _Pairs:
        """Those of some rows, which are numbered from 0 on."""
        first, last = np.searchsorted(self.rows, [rows.start, rows.stop])
        return _Pairs(self.rows[first:last] - rows.start, self.columns[first:last])

    def expand(self, rows: Ints) -> _Pairs:
        """For each number i of rows[p], the pairs of row rows[i], as pairs of i."""
        first = np.searchsorted(self.rows, rows, side="left")
        counts = np.searchsorted(self.rows, rows, side="right") - first
        which = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        return _Pairs(which, self.columns[np.repeat(first, counts) + within])


def _pairs_by_place(rows: Ints, places: Ints, reference_places: Ints) -> _Pairs:
    """rows[n], ascending, and a place for each -> pairs with all references of the place."""
    order = np.argsort(reference_places, kind="stable")
    expanded = _Pairs(reference_places[order], order).expand(places)
    return _Pairs(rows[expanded.rows], expanded.columns)


def _semi_pairs(semi: Sequence[ArrayLike], query_places: Ints, reference_places: Ints) -> _Pairs | None:
    """Pairs of queries with references of their semi-positive places; None when there is no such place."""
    if len(semi) != len(query_places):
        raise ValueError(f"semi_positives has {len(semi)} rows, for {len(query_places)} queries")
    lists = [np.setdiff1d(np.asarray(s, np.int64), [place]) for s, place in zip(semi, query_places, strict=True)]
    rows = np.repeat(np.arange(len(lists)), [len(places) for places in lists])
    places = np.concatenate([np.zeros(0, np.int64), *lists])
    return _pairs_by_place(rows, places, reference_places) if len(places) else None


def _normalise(embeddings: Floats, places: Ints, what: str, first: int = 0) -> NDArray[np.float32]:
    """L2-normalised float32 rows; `first` is the number of the first for the error."""
    if embeddings.ndim != 2 or len(embeddings) != len(places):
        raise ValueError(f"{what} embeddings have shape {embeddings.shape}, for {len(places)} places")
    unit = embeddings.astype(np.float32)
    for start in range(0, len(unit), PAIRS_PER_CHUNK):
        rows = unit[start : start + PAIRS_PER_CHUNK]
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise RunError(f"{len(bad)} {what} embeddings are not finite; the first is row {first + start + bad[0]}")
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return unit


class _Block:
    """Some queries against all references: unit vectors [b, D] and [R, D], and their float32 scores [b, R]."""

    def __init__(self, queries: NDArray[np.float32], references: NDArray[np.float32]) -> None:
        self.queries, self.references = queries, references
        self.scores: NDArray[np.float32] = queries @ references.T

    def exact(self, pairs: _Pairs) -> NDArray[np.float64]:
        """Scores of pairs in float64, each summed in the same order: equal vectors give equal scores."""
        scores = np.empty(len(pairs.rows))
        for start in range(0, len(scores), PAIRS_PER_CHUNK):
            chunk = slice(start, start + PAIRS_PER_CHUNK)
            product = self.queries[pairs.rows[chunk]].astype(np.float64) * self.references[pairs.columns[chunk]]
            scores[chunk] = product.sum(axis=1)
        return scores

    def best(self, pairs: _Pairs) -> NDArray[np.float64]:
        """For each of the b queries its highest exact score among its pairs; minus infinity without any."""
        rough = self.scores[pairs.rows, pairs.columns]
        highest = np.full(len(self.queries), -np.inf)
        np.maximum.at(highest, pairs.rows, rough)
        close = rough >= highest[pairs.rows] - 2 * NEAR_TIE
        best = np.full(len(self.queries), -np.inf)
        np.maximum.at(best, pairs.rows[close], self.exact(_Pairs(pairs.rows[close], pairs.columns[close])))
        return best

    def best_ranks(self, pairs: _Pairs) -> Ints:
        """[2, b]: the rank of each query's best pair among references that are not among its pairs; 0 without any."""
        best = self.best(pairs)
        rows = np.flatnonzero(np.isfinite(best))
        ranks = np.zeros((2, len(best)), np.int64)
        ranks[:, rows] = 1 + self.count_above(rows, best[rows], pairs)
        return ranks

    def count_above(self, rows: Ints, thresholds: NDArray[np.float64], members: _Pairs) -> Ints:
        """[2, p]: references that are no members of rows[p] and score at least (strict) or above (paper) a threshold.

        members are pairs of the block's rows.
        """
        low, high = (thresholds - NEAR_TIE).astype(np.float32), (thresholds + NEAR_TIE).astype(np.float32)
        clear, close = _count(self.scores, rows, low, high)
        ours = members.expand(rows)
        clearly = self.scores[rows[ours.rows], ours.columns] > high[ours.rows]
        clear -= np.bincount(ours.rows[clearly], minlength=len(rows))
        above = np.stack([clear, clear])
        which, columns = _collect(self.scores, rows, low, high, close)
        keys = which * self.scores.shape[1] + columns
        others = ~np.isin(keys, ours.rows * self.scores.shape[1] + ours.columns)
        which, columns = which[others], columns[others]
        exact = self.exact(_Pairs(rows[which], columns))
        for at, counts in enumerate((exact >= thresholds[which], exact > thresholds[which])):
            above[at] += np.bincount(which[counts], minlength=len(rows))
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


def _own_ranks(block: _Block, own: _Pairs) -> tuple[Ints, NDArray[np.float64], NDArray[np.float64]]:
    """ranks[2, b], ap[2, b] and the best own score[b] of a block's queries, from all their own references."""
    size = len(block.queries)
    scores = block.exact(own)
    order = np.lexsort((-scores, own.rows))
    rows, scores = own.rows[order], scores[order]
    above = block.count_above(rows, scores, own)
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    before = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))  # own ones ranked higher
    ranks, best = np.zeros((2, size), np.int64), np.full(size, -np.inf)
    ranks[:, rows[first]], best[rows[first]] = above[:, first] + 1, scores[first]
    position = above + before  # 0-based
    earlier = np.where(position > 0, before / np.maximum(position, 1), 1.0)
    areas = ((before + 1) / (position + 1) + earlier) / 2
    count = np.bincount(rows, minlength=size)
    ap = np.stack([np.bincount(rows, a, size) / np.maximum(count, 1) for a in areas])
    return ranks, np.where(count > 0, ap, np.nan), best


def _hits(block: _Block, own: _Pairs, semi: _Pairs, ranks: Ints, best: NDArray[np.float64]) -> tuple[Bools, Bools]:
    """hits[2, b] and literal_hits[2, b], given the ranks[2, b] and scores[b] of the best own references."""
    scores = block.exact(semi)
    hits = np.zeros_like(ranks, dtype=bool)
    for at, over in enumerate((scores >= best[semi.rows], scores > best[semi.rows])):
        semi_above = np.bincount(semi.rows[over], minlength=len(best))
        hits[at] = (ranks[at] > 0) & (ranks[at] - semi_above == 1)
    rows, columns = np.concatenate([own.rows, semi.rows]), np.concatenate([own.columns, semi.columns])
    order = np.argsort(rows, kind="stable")
    return hits, block.best_ranks(_Pairs(rows[order], columns[order])) == 1


class _Around:
    """Which references lie around which queries, from coordinates [Q, 2] and [R, 2] in degrees."""

    def __init__(self, queries: NDArray[np.float64], references: NDArray[np.float64], radii_m: list[float]) -> None:
        self.queries, self.references, self.radii_m = queries, references, sorted(map(float, radii_m))
        self._known = np.flatnonzero(np.isfinite(references).all(axis=1))
        self._tree = cKDTree(unit_sphere(*references[self._known].T))

    def pairs(self, rows: slice) -> Iterator[tuple[float, _Pairs]]:
        """For each radius the pairs of some queries, numbered from 0 on."""
        if not self.radii_m or not len(self._known):
            return
        known = np.flatnonzero(np.isfinite(self.queries[rows]).all(axis=1))
        reach = 2 * np.sin(min(self.radii_m[-1] / EARTH_RADIUS_M, np.pi) / 2) * (1 + 1e-9) + 1e-12
        found = self._tree.query_ball_point(unit_sphere(*self.queries[rows][known].T), reach)
        counts = np.array([len(columns) for columns in found], dtype=np.int64)
        flat = np.concatenate([np.zeros(0, np.int64), *(np.asarray(c, np.int64) for c in found)])
        which, columns = np.repeat(known, counts), self._known[flat]
        metres = metres_between(*self.queries[rows][which].T, *self.references[columns].T)
        for radius in self.radii_m:
            inside = metres <= radius
            yield radius, _Pairs(which[inside], columns[inside])

    def metres(self, columns: Ints) -> NDArray[np.float64]:
        """From each query to a reference; NaN where one of them has no coordinates."""
        return metres_between(*self.queries.T, *self.references[columns].T)
