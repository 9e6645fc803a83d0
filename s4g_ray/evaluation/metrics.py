"""Compute retrieval metrics from exact ranks, in both protocols.

The gallery is in memory, or is read part by part: gallery_search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from s4g_ray.arrays import Bools, Floats, Floats64, Ints
from s4g_ray.data.pairs import Pairs
from s4g_ray.data.schema import ProtocolName
from s4g_ray.data.sphere import metres_between
from s4g_ray.errors import RunError
from s4g_ray.evaluation.distances import TopDistances
from s4g_ray.evaluation.gallery_parts import GalleryPart, GalleryParts, cut_gallery
from s4g_ray.evaluation.gallery_search import GallerySearch, QuerySide, rank_found
from s4g_ray.evaluation.top_references import TopReferences

# The order of the first axis of arrays that hold both protocols.
PROTOCOLS: tuple[ProtocolName, ProtocolName] = ("strict", "paper")


@dataclass(frozen=True)
class Retrieval:
    """The ranks and errors of Q queries among R references; the first axis of [2, Q] is PROTOCOLS.

    top[Q]: the row of the reference that scores highest. ranks[2, Q]: the rank from 1 of a query's
    best own reference, 0 where it has none: `strict` counts references of other places that score
    at least as high, `paper` only those that score higher. ap[2, Q]: average precision.
    num_left_out: distractors that are not among the references. hits, literal_hits[2, Q]: see
    retrieval_metrics; None without semi-positives. within: by radius in metres, ranks[2, Q] of the
    best reference in that radius; located[Q]: whether a query has coordinates. error_m[Q]: metres
    to the top reference, NaN where unknown.

    Where lists were asked for, else None: listed, the first references of each query, as `strict`
    ranks them; own_best[Q] and own_scores[Q], the row and the score of its best own reference, -1
    and -inf where it has none. distances: to the first references, where ranks for sdm@k and dis@k
    were asked for.
    """

    top: Ints
    ranks: Ints
    ap: Floats64
    num_references: int
    num_left_out: int = 0
    hits: Bools | None = None
    literal_hits: Bools | None = None
    within: dict[float, Ints] = field(default_factory=dict)
    located: Bools | None = None
    error_m: Floats64 | None = None
    listed: TopReferences | None = None
    own_best: Ints | None = None
    own_scores: Floats64 | None = None
    distances: TopDistances | None = None

    @classmethod
    def from_search(
        cls,
        search: GallerySearch,
        num_left_out: int = 0,
        *,
        num_top: int = 0,
        sdm_ranks: Sequence[int] = (),
    ) -> Retrieval:
        """Turn the counts of a search, after its second pass, into ranks and errors.

        num_left_out: distractors of the gallery that were not searched. num_top: how many
        references are listed; sdm_ranks: those of sdm@k and dis@k.
        """
        queries = search.queries
        ranks = np.zeros((2, len(queries)), np.int64)
        first = np.flatnonzero(np.diff(search.own_rows, prepend=-1))  # the best pair of each query
        ranks[:, search.own_rows[first]] = search.own_above[:, first] + 1
        listed = search.list_top()
        distances = None
        if listed is not None and sdm_ranks and queries.latlon is not None:
            positions = search.find_positions(listed.rows)
            distances = TopDistances.from_positions(queries.latlon, positions, sdm_ranks)
        listed = listed.first(num_top) if listed is not None and num_top else None
        own_best = None
        if listed is not None:
            own_best = np.full(len(queries), -1)
            own_best[search.own_rows[first]] = search.own_references[first]
        hits = None
        literal_hits = None
        if queries.semi is not None:
            num_semi = [search.count_semi_above(strict=strict) for strict in (True, False)]
            hits = (ranks > 0) & (ranks - np.stack(num_semi) == 1)
            literal_hits = rank_found(search.best_literal, search.literal_above) == 1
        within = {}
        located = None
        error_m = None
        if queries.latlon is not None:
            located = np.asarray(np.isfinite(queries.latlon).all(axis=1))
            for radius, best in search.best_near.items():
                within[radius] = rank_found(best, search.near_above[radius])
            if search.num_references:
                error_m = metres_between(*queries.latlon.T, *search.top_latlon.T)
        return cls(
            top=search.top,
            ranks=ranks,
            ap=_average_precision(search),
            num_references=search.num_references,
            num_left_out=num_left_out,
            hits=hits,
            literal_hits=literal_hits,
            within=within,
            located=located,
            error_m=error_m,
            listed=listed,
            own_best=own_best,
            own_scores=None if listed is None else search.best_own,
            distances=distances,
        )

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
        values["recall@1%"] = (found <= self._count_one_percent(protocol)).mean()
        values["ap"] = self.ap[at, counted].mean()
        if self.hits is not None and self.literal_hits is not None:
            values["hit_rate"] = self.hits[at, counted].mean()
            values["hit_rate_literal"] = self.literal_hits[at, counted].mean()
        if self.located is not None:
            located = counted & self.located
            values |= self._recall_within_radii(at, located, ranks)
        if self.error_m is not None and np.isfinite(self.error_m[counted]).any():
            values["median_error_m"] = np.nanmedian(self.error_m[counted])
        if self.distances is not None:
            values |= self.distances.metrics(counted)
        values["queries"] = counted.sum()
        values["queries_without_reference"] = chosen.sum() - counted.sum()
        values["references"] = self.num_references
        return {key: float(value) for key, value in values.items()}

    def _count_one_percent(self, protocol: ProtocolName) -> int:
        """Return the k of recall@1%.

        In `paper`, a gallery with distractors is scored as published for University-1652: entry
        round(0.01 R), counted from 0, of the curve, where R counts the distractors too.
        """
        if protocol == "paper" and self.num_left_out:
            return round(0.01 * (self.num_references + self.num_left_out)) + 1
        return max(1, self.num_references // 100)

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
    sdm_ranks: Sequence[int] = (),
) -> dict[str, float]:
    """Compute retrieval metrics by cosine; fractions are in 0..1.

    query_embeddings[Q, D], reference_embeddings[R, D], places [Q] and [R].

    - `recall@k`: the best own reference ranks k or better; `recall@1%`: k = max(1, R // 100); in
      `paper`, with distractors: k = round(0.01 R) + 1, where R counts them too. Of several own
      references the best counts. A query without any is left out, and counted in
      `queries_without_reference`.
    - `ap`: mean average precision, in the trapezoid form of University-1652 (arXiv 2002.12186).
    - with semi_positives[Q] (lists of place_ids; VIGOR, arXiv 2011.12172): `hit_rate`, as
      published: all references that rank above the own one are semi-positives;
      `hit_rate_literal`: the first reference is own or semi-positive.
    - with latlon [Q, 2] and [R, 2] in degrees: `recall@k_within_50m` for each of radii_m: a
      reference of any place at most that far from the query is among the first k, over queries
      with coordinates; `median_error_m`: to the first reference, where both have coordinates.
    - with latlon and sdm_ranks: `sdm@k`, `sdm_m@k` and `dis@k`, as distances.py defines them.

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
        sdm_ranks=sdm_ranks,
    )
    return found[protocol].metrics(protocol, ranks=ranks)


def retrieve(
    query_embeddings: Floats,
    reference_embeddings: Floats,
    query_places: Ints,
    reference_places: Ints,
    **options: Any,
) -> Retrieval:
    """Search every query in a gallery that is in memory, distractors included.

    Arguments and errors are those of retrieval_metrics. The result holds both protocols.
    """
    given = (query_embeddings, reference_embeddings, query_places, reference_places)
    return retrieve_both(*given, protocols=["strict"], **options)["strict"]


def retrieve_both(
    query_embeddings: Floats,
    reference_embeddings: Floats,
    query_places: Ints,
    reference_places: Ints,
    *,
    semi_positives: Sequence[ArrayLike] | None = None,
    query_latlon: Floats64 | None = None,
    reference_latlon: Floats64 | None = None,
    radii_m: Sequence[float] = (25, 50, 100),
    distractors: Bools | None = None,
    protocols: Sequence[ProtocolName] = PROTOCOLS,
    sdm_ranks: Sequence[int] = (),
) -> dict[ProtocolName, Retrieval]:
    """Search every query in a gallery that is in memory, for each protocol.

    Arguments and errors are those of retrieval_metrics.
    """
    semi = None
    if semi_positives is not None:
        semi = _pair_semi_positives(semi_positives, query_places)
    if reference_latlon is None:
        query_latlon = None
    queries = QuerySide(
        query_embeddings, query_places, semi_positives=semi, latlon=query_latlon, radii_m=radii_m
    )
    whole = GalleryPart(reference_embeddings, reference_places, reference_latlon, distractors)
    has_distractors = distractors is not None and bool(distractors.any())
    return retrieve_parts(
        queries,
        cut_gallery(whole),
        has_distractors=has_distractors,
        protocols=protocols,
        sdm_ranks=sdm_ranks,
    )


def retrieve_parts(
    queries: QuerySide,
    parts: GalleryParts,
    *,
    has_distractors: bool,
    protocols: Sequence[ProtocolName] = PROTOCOLS,
    num_top: int = 0,
    sdm_ranks: Sequence[int] = (),
) -> dict[ProtocolName, Retrieval]:
    """Search every query in a gallery that is read part by part, twice; memory O(part + queries).

    One search serves both protocols, unless there are distractors, which `paper` leaves out. The
    ranks, and all metrics of them, do not depend on the parts. num_top: so many references are
    listed for each query, in the search of the whole gallery. sdm_ranks: of sdm@k and dis@k; the
    coordinates of all references then stay in memory. Raises RunError for non-finite embeddings,
    ValueError for shapes that do not fit.
    """
    num_listed = max(sdm_ranks, default=0)
    searches: dict[bool, GallerySearch] = {}  # by whether they leave distractors out
    num_distractors = 0
    for protocol in protocols:
        leaves_out = has_distractors and protocol == "paper"
        if leaves_out not in searches:
            count = num_listed if leaves_out else max(num_top, num_listed)
            searches[leaves_out] = GallerySearch(queries, count, keeps_positions=num_listed > 0)
    for part in parts():
        if part.distractors is not None:
            num_distractors += int(part.distractors.sum())
        for leaves_out, search in searches.items():
            search.find_scores(part.drop_distractors() if leaves_out else part)
    for search in searches.values():
        search.begin_counting()
    for part in parts():
        for leaves_out, search in searches.items():
            search.count_part(part.drop_distractors() if leaves_out else part)
    found = {
        leaves_out: Retrieval.from_search(
            search,
            num_distractors if leaves_out else 0,
            num_top=0 if leaves_out else num_top,
            sdm_ranks=sdm_ranks,
        )
        for leaves_out, search in searches.items()
    }
    return {name: found[has_distractors and name == "paper"] for name in protocols}


def pair_semi_positives(rows: Ints, places: Ints, query_places: Ints) -> Pairs | None:
    """Pair queries rows[p] with semi-positive places[p]: each pair once, none with the own place.

    Returns None where none is left.
    """
    other = places != query_places[rows]
    pairs = np.unique(np.stack([rows[other], places[other]], axis=1), axis=0)
    return Pairs(pairs[:, 0], pairs[:, 1]) if len(pairs) else None


def _pair_semi_positives(semi_positives: Sequence[ArrayLike], query_places: Ints) -> Pairs | None:
    if len(semi_positives) != len(query_places):
        raise ValueError(
            f"semi_positives has {len(semi_positives)} rows, for {len(query_places)} queries"
        )
    lists = [np.asarray(places, np.int64) for places in semi_positives]
    rows = np.repeat(np.arange(len(lists)), [len(places) for places in lists])
    places = np.concatenate([np.zeros(0, np.int64), *lists])
    return pair_semi_positives(rows, places, query_places)


def _average_precision(search: GallerySearch) -> Floats64:
    """Compute ap[2, Q] of a search; NaN for queries without a reference."""
    rows = search.own_rows
    size = len(search.queries)
    first = np.flatnonzero(np.diff(rows, prepend=-1))  # the best pair of each query
    counts = np.diff(np.append(first, len(rows)))
    before = np.arange(len(rows)) - np.repeat(first, counts)  # own references ranked higher
    position = search.own_above + before  # from 0
    earlier = np.where(position > 0, before / np.maximum(position, 1), 1.0)
    areas = ((before + 1) / (position + 1) + earlier) / 2
    num_own = np.bincount(rows, minlength=size)
    ap = np.stack([np.bincount(rows, area, size) / np.maximum(num_own, 1) for area in areas])
    return np.where(num_own > 0, ap, np.nan)
