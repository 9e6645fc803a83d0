"""Retrieval metrics: exact ranks block by block, in both protocols, in memory O(block * R).

For every query a few scores matter: those of its own references, of its semi-positives, of the references
around it. They are computed in float64; how many references of others score as high is counted over a block
of float32 scores, and decided in float64 where the two are too close to call.
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

PROTOCOLS: tuple[ProtocolName, ProtocolName] = (
    "strict",
    "paper",
)  # the order of the first axis of what is counted in both
BLOCK_SCORES = 16_000_000  # scores in one block of the matrix product: 64 MB


@dataclass(frozen=True)
class Retrieval:
    """What each of Q queries found among R references; the first axis of [2, Q] is PROTOCOLS.

    top[Q]: the row of the reference that scores highest. ranks[2, Q]: the 1-based rank of a query's best own
    reference, 0 where it has none: `strict` counts references of others that score as high, `paper` only those
    that score higher. ap[2, Q]: average precision. hits, literal_hits[2, Q]: see retrieval_metrics; None without
    semi-positives. within: by radius in metres, ranks[2, Q] of the best reference in that radius, and located[Q]:
    whether a query has coordinates. error_m[Q]: to the top reference, NaN where it is unknown.
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
        if self.located is not None and (known := counted & self.located).any():
            for radius, near in self.within.items():
                for k in ranks:
                    hit = (near[at, known] > 0) & (near[at, known] <= k)
                    values[f"recall@{k}_within_{radius:.10g}m"] = hit.mean()
        if self.error_m is not None and np.isfinite(self.error_m[counted]).any():
            values["median_error_m"] = np.nanmedian(self.error_m[counted])
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
    query_latlon: Floats64 | None = None,
    reference_latlon: Floats64 | None = None,
    radii_m: Sequence[float] = (25, 50, 100),
    protocol: ProtocolName = "strict",
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
      far from the query is among the first k, whatever its place, over queries with coordinates;
      `median_error_m`: to the first reference, where both have coordinates.

    `strict` lets ties count against the query and keeps everything in the gallery; `paper` lets ties count for
    it, and leaves distractors[R] out. Raises RunError for non-finite embeddings and when no query has a
    reference, ValueError for shapes that do not fit.
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
    """By protocol, what retrieve finds: one search for both, unless there are distractors that `paper` leaves out."""
    found: dict[ProtocolName, Retrieval] = {}
    for protocol in protocols:
        keep = (
            None
            if protocol == "strict" or distractors is None or not distractors.any()
            else ~distractors
        )
        if keep is None and found:
            found[protocol] = next(iter(found.values()))
            continue
        gallery, places, latlon = reference_embeddings, reference_places, reference_latlon
        if keep is not None:
            gallery, places, latlon = (
                gallery[keep],
                places[keep],
                None if latlon is None else latlon[keep],
            )
        found[protocol] = retrieve(
            query_embeddings, gallery, query_places, places, reference_latlon=latlon, **options
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
    """Search every query in the gallery, once for both protocols; arguments and errors as of retrieval_metrics."""
    references = normalise(reference_embeddings, reference_places, "reference")
    if query_embeddings.ndim != 2 or len(query_embeddings) != len(query_places):
        raise ValueError(
            f"query embeddings have shape {query_embeddings.shape}, for {len(query_places)} places"
        )
    if query_embeddings.shape[1] != references.shape[1]:
        raise ValueError(
            f"D differs: queries {query_embeddings.shape[1]}, references {references.shape[1]}"
        )
    own = pairs_by_place(np.arange(len(query_places)), query_places, reference_places)
    semi = (
        None
        if semi_positives is None
        else _semi_pairs(semi_positives, query_places, reference_places)
    )
    around = None
    if query_latlon is not None and reference_latlon is not None:
        around = _Around(query_latlon, reference_latlon, list(radii_m))
    count = len(query_places)
    top, ranks, ap = (
        np.zeros(count, np.int64),
        np.zeros((2, count), np.int64),
        np.full((2, count), np.nan),
    )
    hits, literal = np.zeros((2, count), bool), np.zeros((2, count), bool)
    within = {float(radius): np.zeros((2, count), np.int64) for radius in radii_m} if around else {}
    size = max(1, BLOCK_SCORES // max(len(references), 1))
    buffer = np.empty((min(size, count), len(references)), np.float32)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        block = Block(
            normalise(query_embeddings[rows], query_places[rows], "query", start),
            references,
            buffer,
        )
        top[rows] = block.top()
        mine = own.take(rows)
        ranks[:, rows], ap[:, rows], best = _own_ranks(block, mine)
        if semi is not None:
            hits[:, rows], literal[:, rows] = _hits(
                block, mine, semi.take(rows), ranks[:, rows], best
            )
        for radius, near in around.pairs(rows) if around else ():
            within[radius][:, rows] = block.best_ranks(near)
    metres = around.metres(top) if around and len(references) else None
    located = np.asarray(np.isfinite(around.queries).all(axis=1)) if around else None
    some, literally = (hits, literal) if semi is not None else (None, None)
    return Retrieval(top, ranks, ap, len(references), some, literally, within, located, metres)


def _semi_pairs(
    semi: Sequence[ArrayLike], query_places: Ints, reference_places: Ints
) -> Pairs | None:
    """Pairs of queries with references of their semi-positive places; None when there is no such place."""
    if len(semi) != len(query_places):
        raise ValueError(f"semi_positives has {len(semi)} rows, for {len(query_places)} queries")
    lists = [
        np.setdiff1d(np.asarray(s, np.int64), [place])
        for s, place in zip(semi, query_places, strict=True)
    ]
    rows = np.repeat(np.arange(len(lists)), [len(places) for places in lists])
    places = np.concatenate([np.zeros(0, np.int64), *lists])
    return pairs_by_place(rows, places, reference_places) if len(places) else None


def _own_ranks(block: Block, own: Pairs) -> tuple[Ints, Floats64, Floats64]:
    """ranks[2, b], ap[2, b] and the best own score[b] of a block's queries, from all their own references."""
    size = len(block.queries)
    scores = block.exact(own)
    order = np.lexsort((-scores, own.rows))
    rows, scores = own.rows[order], scores[order]
    above = block.count_above(rows, scores, own)
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    before = np.arange(len(rows)) - np.repeat(
        first, np.diff(np.append(first, len(rows)))
    )  # own ones ranked higher
    ranks, best = np.zeros((2, size), np.int64), np.full(size, -np.inf)
    ranks[:, rows[first]], best[rows[first]] = above[:, first] + 1, scores[first]
    position = above + before  # 0-based
    earlier = np.where(position > 0, before / np.maximum(position, 1), 1.0)
    areas = ((before + 1) / (position + 1) + earlier) / 2
    count = np.bincount(rows, minlength=size)
    ap = np.stack([np.bincount(rows, a, size) / np.maximum(count, 1) for a in areas])
    return ranks, np.where(count > 0, ap, np.nan), best


def _hits(
    block: Block, own: Pairs, semi: Pairs, ranks: Ints, best: Floats64
) -> tuple[Bools, Bools]:
    """hits[2, b] and literal_hits[2, b], given the ranks[2, b] and scores[b] of the best own references."""
    scores = block.exact(semi)
    hits = np.zeros_like(ranks, dtype=bool)
    for at, over in enumerate((scores >= best[semi.rows] - TIE, scores > best[semi.rows] + TIE)):
        semi_above = np.bincount(semi.rows[over], minlength=len(best))
        hits[at] = (ranks[at] > 0) & (ranks[at] - semi_above == 1)
    rows, columns = (
        np.concatenate([own.rows, semi.rows]),
        np.concatenate([own.columns, semi.columns]),
    )
    order = np.argsort(rows, kind="stable")
    return hits, block.best_ranks(Pairs(rows[order], columns[order])) == 1


class _Around:
    """Which references lie around which queries, from coordinates [Q, 2] and [R, 2] in degrees."""

    def __init__(self, queries: Floats64, references: Floats64, radii_m: list[float]) -> None:
        self.queries, self.references, self.radii_m = (
            queries,
            references,
            sorted(map(float, radii_m)),
        )
        self._known = np.flatnonzero(np.isfinite(references).all(axis=1))
        self._tree = cKDTree(unit_sphere(*references[self._known].T))

    def pairs(self, rows: slice) -> Iterator[tuple[float, Pairs]]:
        """For each radius the pairs of some queries, numbered from 0 on."""
        if not self.radii_m or not len(self._known):
            return
        known = np.flatnonzero(np.isfinite(self.queries[rows]).all(axis=1))
        points = unit_sphere(*self.queries[rows][known].T)
        found = self._tree.query_ball_point(points, chord_of(self.radii_m[-1]))
        columns_of = [np.asarray(columns, np.int64) for columns in found]
        counts = [len(columns) for columns in columns_of]
        flat = np.concatenate([np.zeros(0, np.int64), *columns_of])
        which, columns = np.repeat(known, counts), self._known[flat]
        metres = metres_between(*self.queries[rows][which].T, *self.references[columns].T)
        for radius in self.radii_m:
            inside = metres <= radius
            yield radius, Pairs(which[inside], columns[inside])

    def metres(self, columns: Ints) -> Floats64:
        """From each query to a reference; NaN where one of them has no coordinates."""
        return metres_between(*self.queries.T, *self.references[columns].T)
