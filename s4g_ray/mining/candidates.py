"""From ranked references to the neighbors of places: filters that are counted, widening, merging. No Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.errors import InputError, RunError
from s4g_ray.mining.candidate_kernels import filter_rows, merge_rows
from s4g_ray.row_lookup import rows_of

Ask = Callable[
    [Floats32, int], tuple[Ints, Floats32]
]  # queries[M, D], width -> ids, scores [M, width], best first

REASONS = ("own", "semi_positive", "near", "max_score", "relative_margin", "range_min")
RECALL_RANKS = (1, 5, 10)
SPARE = 12  # places asked for beyond k + range_min at first: the own one, some that filters drop, recall@10 for small k


@dataclass(frozen=True)
class References:
    """What is indexed: ids[R], ascending, and the place of each. Raises InputError for what is not that."""

    ids: Ints
    places: Ints

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.places):
            raise InputError(
                f"{len(self.ids)} references have {len(self.places)} places; each needs one"
            )
        check_ascending(self.ids, "reference")
        lost = self.ids[self.places < 0]
        if len(lost):
            raise InputError(
                f"{len(lost)} references have no place; leave them out of the index (id {lost[0]} first)"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def places_of(self, ids: Ints) -> Ints:
        """The place of each id[...], -1 for -1. Raises RunError for an id that is not among the references."""
        rows = rows_of(self.ids, ids)
        unknown = (rows < 0) & (ids != -1)
        if unknown.any():
            raise RunError(
                f"the index returned id {ids[unknown][0]}, which is no reference here; build it again"
            )
        return np.asarray(np.where(rows < 0, -1, self.places[rows]), dtype=np.int64)


def check_ascending(ids: Ints, what: str) -> None:
    """Raises InputError unless there are ids, each once, ascending."""
    if not len(ids):
        raise InputError(f"there are no {what} ids")
    bad = np.flatnonzero(np.diff(ids) <= 0)
    if len(bad):
        fault = (
            "stands there twice" if ids[bad[0]] == ids[bad[0] + 1] else "is not in ascending order"
        )
        raise InputError(f"{what} id {ids[bad[0] + 1]} {fault}; each must stand once, ascending")


@dataclass(frozen=True)
class Filters:
    """Which places are no negatives of a query, and how many are kept of the others.

    k: places kept for each query. exclusions: false negatives that the data set or the distance names. max_score:
    keep scores s <= max_score. relative_margin m: keep s <= p - |p| m, p being the best score of the query's own
    place. A score at the limit is kept, as in sentence-transformers' mine_hard_negatives; unlike its p (1 - m), the
    limit lies below p for negative p too. A query whose own place is not among its candidates keeps none. range_min:
    drop the first `range_min` other places of each query, excluded ones not counted, those above a limit counted.
    Limits are compared in float32, as scores are.
    """

    k: int
    max_score: float | None = None
    relative_margin: float | None = None
    range_min: int = 0
    exclusions: Exclusions | None = None

    @classmethod
    def from_config(cls, cfg: MiningConfig, k: int, exclusions: Exclusions | None) -> Self:
        """Those that a configuration asks for."""
        return cls(k, cfg.max_score, cfg.relative_margin, cfg.range_min, exclusions)


@dataclass(frozen=True)
class Widths:
    """How many candidates a query asks for: at first, and at most."""

    first: int
    limit: int

    @classmethod
    def from_references(cls, references: References, filters: Filters, max_candidates: int) -> Self:
        """Enough for the mean place at first; at most `max_candidates`.

        Or as many as hold k + range_min other places whichever they are, or as train recall needs, if that is more.
        Raises InputError when k exceeds the places that are there.
        """
        counts = np.sort(np.unique(references.places, return_counts=True)[1])
        if not 1 <= filters.k <= len(counts):
            raise InputError(
                f"k={filters.k} neighbors of each place are asked for, but the index holds {len(counts)} places;"
                f" set sampling.neighbor_pool_size to 1..{len(counts) - 1}"
            )
        wanted = filters.k + filters.range_min
        enough = int(counts[-(wanted + 1) :].sum())
        limit = min(max(max_candidates, enough, RECALL_RANKS[-1]), len(references))
        per_place = -(-len(references) // len(counts))
        return cls(min((wanted + SPARE) * per_place, limit), limit)


@dataclass(frozen=True)
class Kept:
    """What M queries keep.

    neighbors[M, k]: places, best first, equal scores by place, -1 pads; scores[M, k]; dropped[M, 6]: candidates
    ahead of the last neighbor that were dropped, by the first of REASONS that applies (of several references of a
    place the best alone is a candidate); num[M] neighbors; above[M]: those that score above the best reference of
    the own place, all of them where it was not found; own_rank[M]: that reference's rank from 1 on, the last among
    equal scores, 0 where it was not found.
    """

    neighbors: Ints
    scores: Floats32
    dropped: Ints
    num: Ints
    above: Ints
    own_rank: Ints

    @classmethod
    def nothing(cls, num_queries: int, k: int) -> Self:
        """Room for so many queries."""
        neighbors = np.full((num_queries, k), -1, dtype=np.int64)
        scores = np.full((num_queries, k), -np.inf, dtype=np.float32)
        num, above, rank = (np.zeros(num_queries, dtype=np.int64) for _ in range(3))
        return cls(
            neighbors,
            scores,
            np.zeros((num_queries, len(REASONS)), dtype=np.int64),
            num,
            above,
            rank,
        )

    def put(self, rows: Ints, found: Kept) -> None:
        """Set some queries to what was found for them."""
        for name, values in vars(found).items():
            getattr(self, name)[rows] = values


def find_neighbors(
    ask: Ask,
    vectors: Floats32,
    own: Ints,
    references: References,
    filters: Filters,
    widths: Widths,
    *,
    block: int,
) -> Kept:
    """vectors[M, D] of queries and their places own[M] -> what they keep of the references that `ask` ranks.

    A query that is left with fewer than k neighbors asks again for twice as many candidates, until it has k or
    `widths.limit` is reached: the result is that of the whole ranking, cut off there. `block` queries are asked at
    once, fewer of the wider ones, so that a block's candidates take the same memory.
    """
    found = Kept.nothing(len(own), filters.k)
    rows, width = np.arange(len(own)), widths.first
    while len(rows):
        size, short = max(1, block * widths.first // width), []
        for start in range(0, len(rows), size):
            asked = rows[start : start + size]
            ids, scores = ask(vectors[asked], width)
            kept = filter_candidates(own[asked], references.places_of(ids), scores, filters)
            found.put(asked, kept)
            short.append(asked[kept.num < filters.k])
        if width >= widths.limit:
            break
        rows, width = np.concatenate(short), min(2 * width, widths.limit)
    return found


def filter_candidates(own: Ints, places: Ints, scores: Floats32, filters: Filters) -> Kept:
    """own[M], places[M, n] and scores[M, n] of candidates, best first, -1 where there is none -> what is kept."""
    kept = Kept.nothing(len(own), filters.k)
    starts = ends = np.zeros(len(own), dtype=np.int64)
    partners, near = np.zeros(0, dtype=np.int64), np.zeros(places.shape, dtype=bool)
    if filters.exclusions is not None:
        semi = filters.exclusions.semi_positives
        (starts, ends), partners = semi.ranges(own), semi.second
        near = filters.exclusions.near(own[:, None], places)
    filter_rows(
        own,
        places,
        scores,
        starts,
        ends,
        partners,
        near,
        np.float32(np.inf if filters.max_score is None else filters.max_score),
        -1.0 if filters.relative_margin is None else filters.relative_margin,
        filters.range_min,
        kept.neighbors,
        kept.scores,
        kept.dropped,
        kept.num,
        kept.above,
        kept.own_rank,
    )
    return kept


def merge_neighbors(query_places: Ints, neighbors: Ints, scores: Floats32, k: int) -> NeighborGraph:
    """query_places[M], neighbors[M, n], scores[M, n] of queries, as in Kept -> the k best of each place.

    A place found through several queries (a tile with two panoramas) counts once, with its best score; equal scores
    are ordered by place.
    """
    places, starts = np.unique(np.sort(query_places), return_index=True)
    merged = np.full((len(places), k), -1, dtype=np.int64)
    merged_scores = np.full((len(places), k), -np.inf, dtype=np.float32)
    order = np.argsort(query_places, kind="stable")
    merge_rows(order, np.append(starts, len(order)), neighbors, scores, merged, merged_scores)
    return NeighborGraph(places, merged, merged_scores)
