from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.arrays import Floats32
from s4g_ray.index.sharded.merging import ALL, ShardAnswer, merge_found, search_filled
from s4g_ray.index.top_k import Found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 10**6)
)
def test_merged_answers_equal_sorting_all_by_score_and_then_id(
    widths: list[int], k: int, seed: int
) -> None:
    """Few different scores: ties within an answer, between answers, and across rank k."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(100)[: sum(widths)] for _ in range(3)])
    scores = (rng.integers(-2, 3, ids.shape) / 2).astype(np.float32)
    edges = np.cumsum([0, *widths])
    found: list[Found] = [(ids[:, a:b], scores[:, a:b]) for a, b in pairwise(edges)]
    merged_ids, merged_scores = merge_found(found, k)
    for row in range(3):
        pairs = zip(scores[row].tolist(), ids[row].tolist(), strict=True)
        wanted = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k]
        assert (
            list(zip(merged_scores[row].tolist(), merged_ids[row].tolist(), strict=True)) == wanted
        )


class Lists:
    """Three shards. A query at effort e sees the e first vectors of its own order in each."""

    def __init__(self, num_queries: int, per_shard: int, num_allowed: int) -> None:
        rng = np.random.default_rng(0)
        self.num_allowed = num_allowed
        self.order = [rng.permutation(num_allowed) for _ in range(num_queries)]
        self.held = [np.arange(per_shard) * 3 + shard for shard in range(3)]
        self.asked: list[tuple[int, int]] = []

    def seen(self, query: int, effort: int) -> list[int]:
        """The ids that a query finds, best first; query 0 sees ten times as many."""
        first = self.order[query][: 10 * effort if query == 0 else effort]
        return sorted(int(i) for held in self.held for i in held[first])

    def ask(self, queries: Floats32, effort: int | None) -> list[ShardAnswer]:
        ran = 100 if effort == ALL else effort or 2
        limit = len(self.held[0])
        self.asked.append((len(queries), ran))
        answers = []
        for held in self.held:
            ids = np.full((len(queries), limit), -1)
            scores = np.full((len(queries), limit), -np.inf, np.float32)
            for row, query in enumerate(queries[:, 0].astype(int)):
                seen = [i for i in self.seen(query, ran) if i in held]
                ids[row, : len(seen)] = seen
                scores[row, : len(seen)] = [-i for i in seen]
            answers.append(ShardAnswer(ids, scores, ran, limit, self.num_allowed))
        return answers


def test_queries_that_lack_results_are_searched_again_by_all_shards_until_they_have_k() -> None:
    lists = Lists(4, per_shard=40, num_allowed=40)
    queries = np.arange(4, dtype=np.float32)[:, None]
    (ids, scores), taken = search_filled(lists.ask, queries, 20, None)
    assert lists.asked == [(4, 2), (3, 8)]  # the first query has enough at once
    for query in range(4):
        wanted = lists.seen(query, 2 if query == 0 else 8)[:20]
        assert ids[query].tolist() == wanted
        assert scores[query].tolist() == [-i for i in wanted]
    assert (taken.queries, taken.repeats, taken.highest) == (4, 3, 8)
    assert taken.mean == (4 * 2 + 3 * 8) / 4


def test_a_search_that_is_restricted_to_few_vectors_is_padded_and_not_repeated_in_vain() -> None:
    lists = Lists(3, per_shard=9, num_allowed=2)
    queries = np.arange(1, 3, dtype=np.float32)[:, None]
    (ids, scores), taken = search_filled(lists.ask, queries, 8, None)
    assert lists.asked == [(2, 2)]
    assert ids.tolist() == [[*range(6), -1, -1]] * 2
    assert np.isneginf(scores[:, 6:]).all()
    assert taken.repeats == 0
    (ids, scores), _ = search_filled(lists.ask, queries, 30, None)  # more than there are
    assert (ids[:, 6:] == -1).all()
    assert scores.shape == (2, 30)


def test_what_the_highest_effort_does_not_lead_to_is_searched_among_all_vectors() -> None:
    asked: list[int | None] = []

    def ask(queries: Floats32, effort: int | None) -> list[ShardAnswer]:
        """One shard of three vectors, of which a graph leads to two."""
        asked.append(effort)
        ids = np.array([[0, 1, 2 if effort == ALL else -1]] * len(queries))
        return [ShardAnswer(ids, np.where(ids < 0, -np.inf, -ids).astype(np.float32), 4, 5, 3)]

    (ids, _), taken = search_filled(ask, np.ones((2, 1), np.float32), 3, 4)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert asked == [4, 5, ALL]
    assert (taken.highest, taken.repeats) == (5, 4)
