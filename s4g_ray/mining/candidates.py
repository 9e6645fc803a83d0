"""Turn ranked references into neighbors: filters that are counted, widening, merging by place.

No Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

# queries[M, D], width -> ids[M, width], scores[M, width], best first
SearchReferences = Callable[[Floats32, int], tuple[Ints, Floats32]]

REASONS = ("own", "semi_positive", "near", "max_score", "relative_margin", "range_min")
RECALL_RANKS = (1, 5, 10)
# places asked for beyond k + range_min at first: the own place, a few that filters drop, and
# enough for recall@10 at small k
SPARE_PLACES = 12


@dataclass(frozen=True)
class References:
    """The indexed references: ids[R], ascending, and places[R].

    Raises InputError when ids are not ascending or repeat, or when a reference has no place.
    """

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
                f"references without a place: {len(lost):,}, the first id {lost[0]}; leave them out"
                " of the index"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def places_of(self, ids: Ints) -> Ints:
        """Return the place of each id[...], -1 for -1.

        Raises RunError for an id that is not among the references.
        """
        rows = rows_of(self.ids, ids)
        is_unknown = (rows < 0) & (ids != -1)
        if is_unknown.any():
            raise RunError(
                f"the index returned id {ids[is_unknown][0]}, which is not among the references of"
                " this run; build the index again"
            )
        return np.asarray(np.where(rows < 0, -1, self.places[rows]), dtype=np.int64)


def check_ascending(ids: Ints, kind: str) -> None:
    """Check that there are ids, ascending, each once; raises InputError.

    kind: the kind of ids ("query", "reference"), for the message.
    """
    if not len(ids):
        raise InputError(f"there are no {kind} ids")
    bad = np.flatnonzero(np.diff(ids) <= 0)
    if not len(bad):
        return
    last = ids[bad[0]]
    wrong = ids[bad[0] + 1]
    fault = "appears twice" if last == wrong else "is not in ascending order"
    raise InputError(f"{kind} id {wrong} {fault}; pass each id once, ascending")


@dataclass(frozen=True)
class Filters:
    """The filters that drop candidates of a query, and the number of places to keep.

    k: places kept for each query. exclusions: false negatives, named by the data set or near in
    metres. max_score: keep scores s <= max_score. relative_margin m: keep s <= p - |p| m, where p
    is the best score of the query's own place; a query whose own place is not among its candidates
    keeps none. A score at a limit is kept, as in sentence-transformers' mine_hard_negatives;
    unlike its p (1 - m), the limit here lies below p for negative p too. range_min: drop the first
    `range_min` other places of each query; excluded places do not count towards it, places above
    a limit do. Limits are compared in float32, as scores are.
    """

    k: int
    max_score: float | None = None
    relative_margin: float | None = None
    range_min: int = 0
    exclusions: Exclusions | None = None

    @classmethod
    def from_config(cls, cfg: MiningConfig, k: int, exclusions: Exclusions | None) -> Self:
        """Return the filters that a configuration sets."""
        return cls(k, cfg.max_score, cfg.relative_margin, cfg.range_min, exclusions)


@dataclass(frozen=True)
class Widths:
    """The number of candidates that a query asks for: at first, and at most."""

    first: int
    limit: int

    @classmethod
    def from_references(cls, references: References, filters: Filters, max_candidates: int) -> Self:
        """Choose the widths for an index.

        The first width is enough for places with the mean number of references. The limit is
        `max_candidates`, or more where that is needed: enough to hold k + range_min other places
        whichever they are, and enough for train recall. Raises InputError when k exceeds the
        number of indexed places.
        """
        ordered = np.sort(references.places)
        is_first = np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])
        counts = np.diff(np.flatnonzero(is_first))  # references of each place
        if not 1 <= filters.k <= len(counts):
            raise InputError(
                f"k={filters.k} neighbors of each place are asked for, but the index holds"
                f" {len(counts)} places; set sampling.neighbor_pool_size to 1..{len(counts) - 1}"
            )
        num_wanted = filters.k + filters.range_min
        first = max(len(counts) - num_wanted - 1, 0)
        enough = int(np.partition(counts, first)[first:].sum())
        limit = min(max(max_candidates, enough, RECALL_RANKS[-1]), len(references))
        mean_per_place = -(-len(references) // len(counts))
        return cls(min((num_wanted + SPARE_PLACES) * mean_per_place, limit), limit)


@dataclass(frozen=True)
class Kept:
    """The neighbors that M queries keep, and counts.

    neighbors[M, k]: places, best first, equal scores by place, -1 pads. scores[M, k].
    dropped[M, 6]: the dropped candidates ahead of the last neighbor, each under the first of
    REASONS that applies; of several references of a place only the best is a candidate.
    num[M]: neighbors. above[M]: neighbors that score above the best reference of the own place;
    all of them where that was not found. own_rank[M]: that reference's rank from 1 on, the last
    among equal scores; 0 where it was not found.
    """

    neighbors: Ints
    scores: Floats32
    dropped: Ints
    num: Ints
    above: Ints
    own_rank: Ints

    @classmethod
    def unfilled(cls, num_queries: int, k: int) -> Self:
        """Return the arrays of queries that keep nothing: pads and zeros."""
        return cls(
            neighbors=np.full((num_queries, k), -1, dtype=np.int64),
            scores=np.full((num_queries, k), -np.inf, dtype=np.float32),
            dropped=np.zeros((num_queries, len(REASONS)), dtype=np.int64),
            num=np.zeros(num_queries, dtype=np.int64),
            above=np.zeros(num_queries, dtype=np.int64),
            own_rank=np.zeros(num_queries, dtype=np.int64),
        )

    def set_rows(self, rows: Ints, kept: Kept) -> None:
        """Replace the values of the queries `rows` by those of another Kept, in that order."""
        for name, values in vars(kept).items():
            getattr(self, name)[rows] = values


def find_neighbors(
    search: SearchReferences,
    vectors: Floats32,
    own: Ints,
    references: References,
    filters: Filters,
    widths: Widths,
    *,
    block: int,
    on_block: Callable[[int], None] | None = None,
) -> Kept:
    """Find the neighbors of queries: vectors[M, D] and their places own[M].

    A query with fewer than k neighbors searches again for twice as many candidates, until it has k
    or `widths.limit` is reached. The result is that of the whole ranking, cut off at the limit.
    `block` queries search at once, fewer of the wider ones, so that the candidates of a block take
    the same memory; the next block searches while one is filtered. on_block is called after each
    block, with the number of its queries that had not searched before.
    """
    found = Kept.unfilled(len(own), filters.k)
    rows = np.arange(len(own))
    width = widths.first
    while len(rows):
        size = max(1, block * widths.first // width)
        blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
        short: list[Ints] = []
        for asked, (ids, scores) in _search_ahead(search, vectors, blocks, width):
            kept = filter_candidates(own[asked], references.places_of(ids), scores, filters)
            found.set_rows(asked, kept)
            short.append(asked[kept.num < filters.k])
            if on_block is not None:
                on_block(len(asked) if width == widths.first else 0)
        if width >= widths.limit:
            break
        rows = np.concatenate(short)
        width = min(2 * width, widths.limit)
    return found


def _search_ahead(
    search: SearchReferences, vectors: Floats32, blocks: Sequence[Ints], width: int
) -> Iterator[tuple[Ints, tuple[Ints, Floats32]]]:
    """Search blocks of rows of vectors[M, D], the next one in a thread; yield rows and answer."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(search, vectors[blocks[0]], width)
        for number, asked in enumerate(blocks):
            answer = ahead.result()
            if number + 1 < len(blocks):
                ahead = pool.submit(search, vectors[blocks[number + 1]], width)
            yield asked, answer


def filter_candidates(own: Ints, places: Ints, scores: Floats32, filters: Filters) -> Kept:
    """Filter the candidates of queries: own[M], places[M, n] and scores[M, n], best first.

    A candidate of place -1 ends the list of its query.
    """
    kept = Kept.unfilled(len(own), filters.k)
    starts = np.zeros(len(own), dtype=np.int64)
    ends = starts
    partners = np.zeros(0, dtype=np.int64)
    near = np.zeros(places.shape, dtype=bool)
    if filters.exclusions is not None:
        semi_positives = filters.exclusions.semi_positives
        starts, ends = semi_positives.ranges(own)
        partners = semi_positives.second
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


def merge_neighbors(
    query_places: Ints, neighbors: Ints, scores: Floats32, k: int, *, last_only: bool = False
) -> NeighborGraph:
    """Merge the neighbors of queries into the k best of each place.

    query_places[M], neighbors[M, n] and scores[M, n] as in Kept. A place that was found through
    several queries (a tile with two panoramas) counts once, with its best score; equal scores are
    ordered by place. last_only: of the queries of a place only the last row counts, as in the
    published code, which keeps one list for each tile.
    """
    places, starts = np.unique(np.sort(query_places), return_index=True)
    merged = np.full((len(places), k), -1, dtype=np.int64)
    merged_scores = np.full((len(places), k), -np.inf, dtype=np.float32)
    order = np.argsort(query_places, kind="stable")
    edges = np.append(starts, len(order))
    if last_only:
        order = order[edges[1:] - 1]
        edges = np.arange(len(places) + 1)
    merge_rows(order, edges, neighbors, scores, merged, merged_scores)
    return NeighborGraph(places, merged, merged_scores)
