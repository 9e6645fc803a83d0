"""Compute retrieval metrics from exact ranks, in both protocols, in memory O(block * R).

Each query has a few scores that matter: those of its own references, of its semi-positives and of
the references near it. They are computed in float64. How many other references score as high is
counted over a block of float32 scores, and decided in float64 where two scores nearly tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats, Floats64, Ints
from s4g_ray.data.pairs import Pairs, pairs_by_place
from s4g_ray.data.schema import ProtocolName
from s4g_ray.data.sphere import chord_of, metres_between, unit_sphere
from s4g_ray.errors import RunError
from s4g_ray.evaluation.ranking import TIE, Block, normalise

# The order of the first axis of arrays that hold both protocols.
PROTOCOLS: tuple[ProtocolName, ProtocolName] = ("strict", "paper")
BLOCK_SCORES = 16_000_000  # scores in one block of the matrix product: 64 MB


@dataclass(frozen=True)
class Retrieval:
    """The ranks and errors of Q queries among R references; the first axis of [2, Q] is PROTOCOLS.

    top[Q]: the row of the reference that scores highest. ranks[2, Q]: the rank from 1 of a query's
    best own reference, 0 where it has none: `strict` counts references of other places that score
    at least as high, `paper` only those that score higher. ap[2, Q]: average precision. hits,
    literal_hits[2, Q]: see retrieval_metrics; None without semi-positives. within: by radius in
    metres, ranks[2, Q] of the best reference in that radius; located[Q]: whether a query has
    coordinates. error_m[Q]: metres to the top reference, NaN where unknown.
    """

    top: Ints
    ranks: Ints
    ap: Floats64
    num_references: int
    hits: Bools | None = None
    literal_hits: Bools | None = None
    within: dict[float, Ints] = field(default_factory=dict)
    located: Bools | None = None
    error_m: Floats64 | None = None

    def metrics(
        self,
        protocol: ProtocolName = "strict",
        *,
        ranks: Sequence[int] = (1, 5, 10),
        rows: Bools | None = None,
    ) -> dict[str, float]:
        """Compute the metrics of all queries, or of chosen rows[Q].

        Raises RunError when none of them has a reference.
        """
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
        if self.located is not None:
            located = counted & self.located
            values |= self._recall_within_radii(at, located, ranks)
        if self.error_m is not None and np.isfinite(self.error_m[counted]).any():
            values["median_error_m"] = np.nanmedian(self.error_m[counted])
        values["queries"] = counted.sum()
        values["queries_without_reference"] = chosen.sum() - counted.sum()
        values["references"] = self.num_references
        return {key: float(value) for key, value in values.items()}

    def _recall_within_radii(
        self, at: int, located: Bools, ranks: Sequence[int]
    ) -> dict[str, np.floating[Any]]:
        """Compute recall within each radius over located[Q]; `at` is the protocol's number."""
        values: dict[str, np.floating[Any]] = {}
        if not located.any():
            return values
        for radius, near_ranks in self.within.items():
            found = near_ranks[at, located]
            for k in ranks:
                is_hit = (found > 0) & (found <= k)
                values[f"recall@{k}_within_{radius:.10g}m"] = is_hit.mean()
        return values


def retrieval_metrics(
    query_embeddings: Floats,
    reference_embeddings: Floats,
    query_places: Ints,
    reference_places: Ints,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    semi_positives: Sequence[ArrayLike] | None = None,
    query_latlon: Floats64 | None = None,
    reference_latlon: Floats64 | None = None,
    radii_m: Sequence[float] = (25, 50, 100),
    protocol: ProtocolName = "strict",
    distractors: Bools | None = None,
) -> dict[str, float]:
    """Compute retrieval metrics by cosine; fractions are in 0..1.

    query_embeddings[Q, D], reference_embeddings[R, D], places [Q] and [R].

    - `recall@k`: the best own reference ranks k or better; `recall@1%`: k = max(1, R // 100). Of
      several own references the best counts. A query without any is left out, and counted in
      `queries_without_reference`.
    - `ap`: mean average precision, in the trapezoid form of University-1652 (arXiv 2002.12186).
    - with semi_positives[Q] (lists of place_ids; VIGOR, arXiv 2011.12172): `hit_rate`, as
      published: all references that rank above the own one are semi-positives;
      `hit_rate_literal`: the first reference is own or semi-positive.
    - with latlon [Q, 2] and [R, 2] in degrees: `recall@k_within_50m` for each of radii_m: a
      reference of any place at most that far from the query is among the first k, over queries
      with coordinates; `median_error_m`: to the first reference, where both have coordinates.

    `strict` ranks a query's own reference behind those that tie with it and keeps the whole
    gallery; `paper` ranks it before them, and leaves distractors[R] out. Raises RunError for
    non-finite embeddings and when no query has a reference, ValueError for shapes that do not fit.
    """
    found = retrieve_both(
        query_embeddings,
        reference_embeddings,
        query_places,
        reference_places,
        semi_positives=semi_positives,
        query_latlon=query_latlon,
        reference_latlon=reference_latlon,
        radii_m=radii_m,
        distractors=distractors,
        protocols=[protocol],
    )
    return found[protocol].metrics(protocol, ranks=ranks)


def retrieve_both(
    query_embeddings: Floats,
    reference_embeddings: Floats,
    query_places: Ints,
    reference_places: Ints,
    *,
    reference_latlon: Floats64 | None = None,
    distractors: Bools | None = None,
    protocols: Sequence[ProtocolName] = PROTOCOLS,
    **options: Any,
) -> dict[ProtocolName, Retrieval]:
    """Retrieve for each protocol; options are those of retrieve.

    One search serves both, unless there are distractors, which `paper` leaves out.
    """
    has_distractors = distractors is not None and bool(distractors.any())
    found: dict[ProtocolName, Retrieval] = {}
    for protocol in protocols:
        embeddings = reference_embeddings
        places = reference_places
        latlon = reference_latlon
        if distractors is not None and has_distractors and protocol == "paper":
            keep = ~distractors
            embeddings = embeddings[keep]
            places = places[keep]
            latlon = None if latlon is None else latlon[keep]
        elif found:
            found[protocol] = next(iter(found.values()))
            continue
        found[protocol] = retrieve(
            query_embeddings, embeddings, query_places, places, reference_latlon=latlon, **options
        )
    return found


def retrieve(
    query_embeddings: Floats,
    reference_embeddings: Floats,
    query_places: Ints,
    reference_places: Ints,
    *,
    semi_positives: Sequence[ArrayLike] | None = None,
    query_latlon: Floats64 | None = None,
    reference_latlon: Floats64 | None = None,
    radii_m: Sequence[float] = (25, 50, 100),
) -> Retrieval:
    """Search every query in the gallery, once for both protocols.

    Arguments and errors are those of retrieval_metrics.
    """
    references = normalise(reference_embeddings, reference_places, "reference")
    _check_queries(query_embeddings, query_places, references.shape[1])
    count = len(query_places)
    own = pairs_by_place(np.arange(count), query_places, reference_places)
    semi = None
    if semi_positives is not None:
        semi = _pair_semi_positives(semi_positives, query_places, reference_places)
    nearby = None
    if query_latlon is not None and reference_latlon is not None:
        nearby = _NearbyReferences(query_latlon, reference_latlon, radii_m)
    top = np.zeros(count, np.int64)
    ranks = np.zeros((2, count), np.int64)
    ap = np.full((2, count), np.nan)
    hits = np.zeros((2, count), bool)
    literal_hits = np.zeros((2, count), bool)
    within: dict[float, Ints] = {}
    if nearby:
        within = {float(radius): np.zeros((2, count), np.int64) for radius in radii_m}
    size = max(1, BLOCK_SCORES // max(len(references), 1))
    buffer = np.empty((min(size, count), len(references)), np.float32)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        queries = normalise(query_embeddings[rows], query_places[rows], "query", start)
        block = Block(queries, references, buffer)
        top[rows] = block.find_top()
        block_own = own.take(rows)
        ranks[:, rows], ap[:, rows], best = _rank_own(block, block_own)
        if semi is not None:
            hits[:, rows], literal_hits[:, rows] = _find_hits(
                block, block_own, semi.take(rows), ranks[:, rows], best
            )
        if nearby:
            for radius, near in nearby.find_pairs(rows):
                within[radius][:, rows] = block.rank_best(near)
    return Retrieval(
        top,
        ranks,
        ap,
        len(references),
        hits if semi is not None else None,
        literal_hits if semi is not None else None,
        within,
        nearby.find_located() if nearby else None,
        nearby.metres_to(top) if nearby and len(references) else None,
    )


def _check_queries(embeddings: Floats, places: Ints, dim: int) -> None:
    """Raise ValueError unless embeddings has one row for each place, of `dim` values."""
    if embeddings.ndim != 2 or len(embeddings) != len(places):
        raise ValueError(
            f"query embeddings have shape {embeddings.shape}, for {len(places)} places"
        )
    if embeddings.shape[1] != dim:
        raise ValueError(
            f"D differs: queries {embeddings.shape[1]}, references {dim}; embed both with one model"
        )


def _pair_semi_positives(
    semi_positives: Sequence[ArrayLike], query_places: Ints, reference_places: Ints
) -> Pairs | None:
    """Pair queries with references of their semi-positive places; None without such places."""
    if len(semi_positives) != len(query_places):
        raise ValueError(
            f"semi_positives has {len(semi_positives)} rows, for {len(query_places)} queries"
        )
    lists = []
    for semi, place in zip(semi_positives, query_places, strict=True):
        lists.append(np.setdiff1d(np.asarray(semi, np.int64), [place]))
    rows = np.repeat(np.arange(len(lists)), [len(places) for places in lists])
    if not len(rows):
        return None
    return pairs_by_place(rows, np.concatenate(lists), reference_places)


def _rank_own(block: Block, own: Pairs) -> tuple[Ints, Floats64, Floats64]:
    """Compute ranks[2, b], ap[2, b] and the best own score[b] of a block's queries."""
    size = len(block.queries)
    scores = block.score_pairs(own)
    order = np.lexsort((-scores, own.rows))
    rows = own.rows[order]
    scores = scores[order]
    above = block.count_above(rows, scores, own)
    first = np.flatnonzero(np.diff(rows, prepend=-1))  # the best pair of each query
    counts = np.diff(np.append(first, len(rows)))
    before = np.arange(len(rows)) - np.repeat(first, counts)  # own references ranked higher
    ranks = np.zeros((2, size), np.int64)
    ranks[:, rows[first]] = above[:, first] + 1
    best = np.full(size, -np.inf)
    best[rows[first]] = scores[first]
    position = above + before  # from 0
    earlier = np.where(position > 0, before / np.maximum(position, 1), 1.0)
    areas = ((before + 1) / (position + 1) + earlier) / 2
    num_own = np.bincount(rows, minlength=size)
    ap = np.stack([np.bincount(rows, area, size) / np.maximum(num_own, 1) for area in areas])
    return ranks, np.where(num_own > 0, ap, np.nan), best


def _find_hits(
    block: Block, own: Pairs, semi: Pairs, ranks: Ints, best: Floats64
) -> tuple[Bools, Bools]:
    """Compute hits[2, b] and literal_hits[2, b].

    ranks[2, b] and best[b] are those of the best own references.
    """
    scores = block.score_pairs(semi)
    at_least = scores >= best[semi.rows] - TIE
    higher = scores > best[semi.rows] + TIE
    hits = np.zeros_like(ranks, dtype=bool)
    for at, is_above in enumerate((at_least, higher)):
        num_semi_above = np.bincount(semi.rows[is_above], minlength=len(best))
        hits[at] = (ranks[at] > 0) & (ranks[at] - num_semi_above == 1)
    rows = np.concatenate([own.rows, semi.rows])
    columns = np.concatenate([own.columns, semi.columns])
    order = np.argsort(rows, kind="stable")
    return hits, block.rank_best(Pairs(rows[order], columns[order])) == 1


class _NearbyReferences:
    """Finds the references near queries, from coordinates [Q, 2] and [R, 2] in degrees."""

    def __init__(self, queries: Floats64, references: Floats64, radii_m: Sequence[float]) -> None:
        self._queries = queries
        self._references = references
        self._radii_m = sorted(float(radius) for radius in radii_m)
        self._known = np.flatnonzero(np.isfinite(references).all(axis=1))
        self._tree = cKDTree(unit_sphere(*references[self._known].T))

    def find_pairs(self, rows: slice) -> Iterator[tuple[float, Pairs]]:
        """Yield for each radius the pairs of a range of queries, numbered from 0."""
        if not self._radii_m or not len(self._known):
            return
        queries = self._queries[rows]
        located = np.flatnonzero(np.isfinite(queries).all(axis=1))
        points = unit_sphere(*queries[located].T)
        found = self._tree.query_ball_point(points, chord_of(self._radii_m[-1]))
        lists = [np.asarray(columns, np.int64) for columns in found]
        indices = np.repeat(located, [len(columns) for columns in lists])
        columns = self._known[np.concatenate([np.zeros(0, np.int64), *lists])]
        metres = metres_between(*queries[indices].T, *self._references[columns].T)
        for radius in self._radii_m:
            inside = metres <= radius
            yield radius, Pairs(indices[inside], columns[inside])

    def find_located(self) -> Bools:
        """Find which queries have coordinates: located[Q]."""
        return np.asarray(np.isfinite(self._queries).all(axis=1))

    def metres_to(self, columns: Ints) -> Floats64:
        """Compute metres from each query to a reference; NaN where either has no coordinates."""
        return metres_between(*self._queries.T, *self._references[columns].T)
