"""Merge the answers of shards, and search again for the queries that lack results.

A shard searches once, at one search effort, and pads its answer where the lists that it visited
hold too few vectors. Only the merged answer shows which queries lack results; all shards then
search for those at a higher effort, so that they answer as one index does. No Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.index.top_k import Found

FILL_FACTOR = 4  # of the search effort, for queries that lack results
ALL = -1  # as a search effort: whatever it takes to find k vectors


@dataclass(frozen=True)
class ShardAnswer:
    """The answer of one shard: ids[M, n], scores[M, n], best first, padded with -1 and -inf.

    effort: the search effort that ran, of at most max_effort; both are 0 for exact kinds.
    num_allowed: the vectors of the shard that the search may find; k where it is not counted,
    because all results are there.
    """

    ids: Ints
    scores: Floats32
    effort: int
    max_effort: int
    num_allowed: int = 0


@dataclass(frozen=True)
class SearchEffort:
    """The search effort that a number of queries took, repeated searches included."""

    queries: int = 0
    total: int = 0
    highest: int = 0
    repeats: int = 0  # searches of one query that lacked results

    @property
    def mean(self) -> float | None:
        """The mean over the queries; None without any."""
        return self.total / self.queries if self.queries else None

    def describe(self) -> str:
        """Return the effort as the end of a line; empty for exact kinds."""
        if not self.highest or self.mean is None:
            return ""
        again = f", {self.repeats / self.queries:.1%} of queries searched again"
        return f", effort {self.mean:.4g} a query, highest {self.highest}{again}"

    def plus(self, num_queries: int, effort: int, *, is_repeat: bool) -> SearchEffort:
        """Count a search of some queries at one effort."""
        return SearchEffort(
            self.queries + (0 if is_repeat else num_queries),
            self.total + num_queries * effort,
            max(self.highest, effort),
            self.repeats + (num_queries if is_repeat else 0),
        )


# (queries[m, D], effort or None: that of the index) -> the answers of all shards
AskShards = Callable[[Floats32, int | None], Sequence[ShardAnswer]]


def search_filled(
    ask: AskShards, queries: Floats32, k: int, effort: int | None
) -> tuple[Found, SearchEffort]:
    """Search all shards for queries[M, D] -> ids[M, k], scores[M, k], and the effort that it took.

    Queries that lack results are searched again at FILL_FACTOR times the effort, up to the highest,
    and where that does not lead to them (a graph, or a GPU's limit) among all vectors. Results are
    padded only where fewer than k vectors are allowed.
    """
    answers = ask(queries, effort)
    ids, scores = _merge_answers(answers, k)
    ran = max(answer.effort for answer in answers)
    limit = max(answer.max_effort for answer in answers)
    wanted = min(k, sum(answer.num_allowed for answer in answers))
    taken = SearchEffort().plus(len(queries), ran, is_repeat=False)
    short = np.flatnonzero((ids[:, :wanted] < 0).any(axis=1))
    while len(short):
        if ran >= limit:
            ids[short], scores[short] = _merge_answers(ask(queries[short], ALL), k)
            return (ids, scores), taken.plus(len(short), limit, is_repeat=True)
        ran = min(FILL_FACTOR * ran, limit)
        ids[short], scores[short] = _merge_answers(ask(queries[short], ran), k)
        taken = taken.plus(len(short), ran, is_repeat=True)
        short = short[(ids[short][:, :wanted] < 0).any(axis=1)]
    return (ids, scores), taken


def _merge_answers(answers: Sequence[ShardAnswer], k: int) -> Found:
    """Merge answers into ids[M, k], scores[M, k], padded where they have fewer columns."""
    ids, scores = merge_found([(answer.ids, answer.scores) for answer in answers], k)
    missing = ((0, 0), (0, k - ids.shape[1]))
    return (
        np.pad(ids, missing, constant_values=-1),
        np.pad(scores, missing, constant_values=-np.inf),
    )


def merge_found(found: Sequence[Found], k: int) -> Found:
    """Merge answers ids[M, n], scores[M, n] to the same queries into the k best, ties by lower id.

    The only merge rule of the index. n may differ between answers; returns fewer than k columns
    when all answers together have fewer.
    """
    ids = np.concatenate([ids for ids, _ in found], axis=1)
    scores = np.concatenate([scores for _, scores in found], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    # a tie down to rank k + 1 may change the result; few rows have one, and sorting by two keys
    # is slow
    tied = np.flatnonzero((ranked[:, 1 : k + 1] == ranked[:, :-1][:, :k]).any(axis=1))
    order[tied] = np.lexsort((ids[tied], -scores[tied]), axis=1)
    order = order[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
