from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.places import Places
from s4g_ray.errors import InputError, RunError
from s4g_ray.mining.candidates import (
    REASONS,
    Filters,
    References,
    Widths,
    filter_candidates,
    find_neighbors,
    merge_neighbors,
)

STEP_M = 111_195.08  # a degree of latitude


@dataclass
class FullRanking:
    """An index of all scores[Q, R]. A query's vector is its number."""

    ids: Ints
    scores: Floats32
    widest: int = 0
    num_asked: int = 0

    def search(self, queries: Floats32, width: int) -> tuple[Ints, Floats32]:
        """Return the first of the whole ranking, equal scores by id."""
        self.widest = max(self.widest, width)
        self.num_asked += len(queries)
        scores = self.scores[queries[:, 0].astype(int)]
        order = np.argsort(-scores, axis=1, kind="stable")[:, :width]
        return self.ids[order], np.take_along_axis(scores, order, 1)


def loop_over_ranking(
    own: int,
    places: list[int],
    scores: list[float],
    filters: Filters,
    semi: set[tuple[int, int]],
    reach: int,
) -> dict[str, Any]:
    """Filter the whole ranking of a query, one candidate at a time.

    Places are near when their numbers differ by at most `reach`.
    """
    positives = [s for place, s in zip(places, scores, strict=True) if place == own]
    kept: list[tuple[int, float]] = []
    dropped = dict.fromkeys(REASONS, 0)
    rank = 0
    seen = set()
    for place, score in zip(places, scores, strict=True):
        if len(kept) == filters.k:
            break
        if place in seen:
            continue
        seen.add(place)
        if place == own:
            dropped["own"] += 1
            continue
        if (own, place) in semi or (place, own) in semi:
            dropped["semi_positive"] += 1
            continue
        if abs(own - place) <= reach:
            dropped["near"] += 1
            continue
        rank += 1
        if filters.max_score is not None and score > np.float32(filters.max_score):
            dropped["max_score"] += 1
        elif filters.relative_margin is not None and (
            not positives
            or score > np.float32(positives[0] - abs(positives[0]) * filters.relative_margin)
        ):
            dropped["relative_margin"] += 1
        elif rank <= filters.range_min:
            dropped["range_min"] += 1
        else:
            kept.append((place, score))
    return {
        "kept": kept,
        "dropped": list(dropped.values()),
        "above": sum(not positives or score > positives[0] for _, score in kept),
        "own_rank": places.index(own) + 1 if positives else 0,
    }


@settings(max_examples=150, deadline=None)
@given(
    num_references=st.integers(4, 60),
    num_places=st.integers(3, 30),
    k=st.integers(1, 4),
    range_min=st.integers(0, 3),
    max_score=st.none() | st.floats(-0.5, 0.5),
    margin=st.none() | st.floats(0, 0.5),
    reach=st.integers(0, 3),
    max_candidates=st.integers(1, 70),
    block=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_kept_neighbors_and_counts_equal_a_plain_loop_over_the_whole_ranking(
    num_references: int,
    num_places: int,
    k: int,
    range_min: int,
    max_score: float | None,
    margin: float | None,
    reach: int,
    max_candidates: int,
    block: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    reference_places = (
        np.concatenate([np.arange(4), rng.integers(0, num_places, num_references - 4)]) + 10
    )
    rng.shuffle(reference_places)
    k = min(k, len(np.unique(reference_places)) - 1)
    ids = np.sort(rng.choice(1000, num_references, replace=False))
    own = rng.integers(10, 10 + num_places, 7)
    scores = (rng.permutation(7 * num_references) / (7 * num_references) - 0.5).astype(np.float32)
    scores = scores.reshape(7, num_references)
    named = rng.integers(10, 10 + num_places, (2, 5))
    line = Places(np.arange(10, 50), np.arange(40.0), np.zeros(40))
    exclusions = Exclusions(line, PlacePairs.from_arrays(*named), reach * STEP_M * 1.01)
    filters = Filters(k, max_score, margin, range_min, exclusions)
    references = References(ids, reference_places)
    widths = Widths.from_references(references, filters, max_candidates)
    index = FullRanking(ids, scores)
    found = find_neighbors(
        index.search,
        np.arange(7, dtype=np.float32)[:, None],
        own,
        references,
        filters,
        widths,
        block=block,
    )
    assert index.widest <= widths.limit <= num_references
    pairs = {(int(a), int(b)) for a, b in named.T if a != b}
    order = np.argsort(-scores, axis=1)[:, : widths.limit]
    for i in range(7):
        ranked = reference_places[order[i]].tolist()
        wanted = loop_over_ranking(
            int(own[i]), ranked, scores[i, order[i]].tolist(), filters, pairs, reach
        )
        kept = wanted["kept"]
        assert found.neighbors[i].tolist() == [place for place, _ in kept] + [-1] * (k - len(kept))
        assert found.scores[i, : len(kept)].tolist() == [score for _, score in kept]
        assert found.dropped[i].tolist() == wanted["dropped"]
        assert (found.num[i], found.above[i]) == (len(kept), wanted["above"])
        for rank in (1, 5, 10):
            assert (0 < found.own_rank[i] <= rank) == (0 < wanted["own_rank"] <= rank)


def filter_one_query(
    places: list[int], scores: list[float], own: int, filters: Filters
) -> tuple[list[int], list[int]]:
    """Return the neighbors that a query keeps, and its counts of dropped candidates."""
    kept = filter_candidates(
        np.array([own]), np.array([places]), np.array([scores], np.float32), filters
    )
    return kept.neighbors[0].tolist(), kept.dropped[0].tolist()


def test_each_candidate_is_counted_under_the_first_reason_that_applies() -> None:
    line = Places(np.arange(20), np.arange(20.0), np.zeros(20))
    exclusions = Exclusions(
        line, PlacePairs.from_arrays(np.array([5, 5]), np.array([9, 6])), 1.01 * STEP_M
    )
    filters = Filters(2, 0.9, 0.25, 4, exclusions)
    # p = 0.8, so the margin's limit is 0.6: place 10 is above both limits, 11 only above the
    # margin's, 13 at it
    places = [10, 6, 9, 4, 5, 11, 5, 13, 14, 15, 16]
    scores = [0.95, 0.94, 0.93, 0.92, 0.8, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3]
    assert filter_one_query(places, scores, 5, filters) == ([15, 16], [1, 2, 1, 1, 1, 2])


@pytest.mark.parametrize(("positive", "limit"), [(0.5, 0.375), (-0.5, -0.625), (0.0, 0.0)])
def test_the_margin_lowers_the_limit_for_negative_scores_too_and_keeps_scores_at_the_limit(
    positive: float, limit: float
) -> None:
    above = float(np.nextafter(np.float32(limit), np.float32(1)))
    scores = sorted([positive, above, limit, -0.9], reverse=True)
    if limit == positive:
        places = [2, 1, 3, 4]
    else:
        places = [{positive: 1, limit: 3}.get(score, 2) for score in scores]
    places[-1] = 4
    kept, dropped = filter_one_query(places, scores, 1, Filters(3, relative_margin=0.25))
    assert kept == [3, 4, -1]
    assert dropped == [1, 0, 0, 0, 1, 0]


def test_a_query_without_its_own_place_among_the_candidates_keeps_nothing_under_a_margin() -> None:
    assert filter_one_query([2, 3], [0.1, 0.0], 1, Filters(2, relative_margin=0.0)) == (
        [-1, -1],
        [0, 0, 0, 0, 2, 0],
    )
    kept = filter_candidates(
        np.array([1]), np.array([[2, 3]]), np.array([[0.1, 0]], np.float32), Filters(2)
    )
    assert (kept.above.tolist(), kept.own_rank.tolist()) == ([2], [0])


def test_equal_scores_are_ordered_by_place_and_rank_ahead_of_the_own_place() -> None:
    places = np.array([[7, 1, 5, 9, 3]])
    scores = np.array([[0.5, 0.5, 0.5, 0.5, 0.1]], np.float32)
    kept = filter_candidates(np.array([1]), places, scores, Filters(4))
    assert kept.neighbors.tolist() == [[5, 7, 9, 3]]
    assert (kept.own_rank.tolist(), kept.above.tolist()) == ([4], [0])


def test_pads_at_the_end_of_a_short_answer_are_no_candidates() -> None:
    assert filter_one_query([2, -1, -1], [0.1, -np.inf, -np.inf], 1, Filters(2)) == (
        [2, -1],
        [0] * 6,
    )


def test_only_queries_that_lack_neighbors_ask_for_more() -> None:
    # place 0 has twice as many references as all others together
    places = np.repeat(np.arange(100), [200] + [1] * 99)
    scores = np.zeros((2, 299), np.float32)
    scores[0, :200] = 1
    scores[1, 250:] = 1
    scores += np.linspace(0.1, 0, 299, dtype=np.float32)
    index = FullRanking(np.arange(299), scores)
    references = References(np.arange(299), places)
    filters = Filters(8)
    widths = Widths.from_references(references, filters, 10)
    vectors = np.array([[0], [1]], np.float32)
    found = find_neighbors(
        index.search, vectors, np.array([5, 6]), references, filters, widths, block=10
    )
    assert found.num.tolist() == [8, 8]
    assert found.neighbors[0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    # first: three references a place; limit: those of place 0 and of eight others
    assert (widths.first, widths.limit) == (60, 208)
    assert (index.widest, index.num_asked) == (208, 4)


def test_a_repeatedly_widened_search_stops_at_max_candidates() -> None:
    references = References(np.arange(500), np.arange(500))
    filters = Filters(3, max_score=-1)
    index = FullRanking(np.arange(500), np.zeros((1, 500), np.float32))
    widths = Widths.from_references(references, filters, 100)
    found = find_neighbors(
        index.search,
        np.zeros((1, 1), np.float32),
        np.array([0]),
        references,
        filters,
        widths,
        block=1,
    )
    assert (index.widest, found.num.tolist(), found.dropped[0, 3]) == (100, [0], 99)


def test_impossible_references_and_numbers_of_neighbors_are_refused() -> None:
    one_to_four = np.arange(1, 5)
    with pytest.raises(InputError, match="4 references have 3 places"):
        References(one_to_four, np.arange(3))
    with pytest.raises(
        InputError, match="reference id 2 appears twice; pass each id once, ascending"
    ):
        References(np.array([1, 2, 2]), np.arange(3))
    with pytest.raises(InputError, match="reference id 1 is not in ascending order"):
        References(np.array([2, 1]), np.arange(2))
    with pytest.raises(InputError, match=r"references without a place: 1, the first id 3"):
        References(one_to_four, np.array([4, 4, -1, 4]))
    with pytest.raises(InputError, match="no reference ids"):
        References(np.zeros(0, np.int64), np.zeros(0, np.int64))
    references = References(one_to_four, np.array([7, 8, 8, 9]))
    with pytest.raises(
        InputError, match=r"k=4 .* holds 3 places; set sampling\.neighbor_pool_size to 1\.\.2"
    ):
        Widths.from_references(references, Filters(4), 10)
    with pytest.raises(
        RunError, match="returned id 5, which is not among the references of this run"
    ):
        references.places_of(np.array([[1, 5]]))
    assert references.places_of(np.array([[4, 2, -1]])).tolist() == [[9, 8, -1]]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 6), st.integers(0, 10**6))
def test_merging_equals_dictionaries_of_best_scores(
    num_queries: int, width: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    query_places = rng.integers(0, 5, num_queries)
    neighbors = np.full((num_queries, width), -1)
    scores = np.full((num_queries, width), -np.inf, np.float32)
    best: dict[int, dict[int, float]] = {int(place): {} for place in query_places}
    for i, place in enumerate(query_places.tolist()):
        found = {
            int(p): int(rng.integers(-3, 4))
            for p in rng.permutation(np.arange(10, 22))[: rng.integers(width + 1)]
        }
        ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        for j, (other, score) in enumerate(ordered):
            neighbors[i, j] = other
            scores[i, j] = score
            best[place][other] = max(best[place].get(other, -np.inf), score)
    graph = merge_neighbors(query_places, neighbors, scores, k)
    assert graph.place_ids.tolist() == sorted(best)
    assert graph.scores is not None
    for row, place in enumerate(sorted(best)):
        wanted = sorted(best[place].items(), key=lambda item: (-item[1], item[0]))[:k]
        assert graph.neighbors[row].tolist() == [other for other, _ in wanted] + [-1] * (
            k - len(wanted)
        )
        assert graph.scores[row, : len(wanted)].tolist() == [value for _, value in wanted]


def test_the_neighbors_of_all_panoramas_of_a_tile_are_merged() -> None:
    """Tile 1 has two panoramas; the second must not overwrite the neighbors of the first."""
    neighbors = np.array([[3, 4], [1, 3], [5, 3]])
    scores = np.array([[0.8, 0.3], [0.6, 0.5], [0.7, 0.4]], dtype=np.float32)
    graph = merge_neighbors(np.array([1, 2, 1]), neighbors, scores, 3)
    assert graph.neighbors.tolist() == [[3, 5, 4], [1, 3, -1]]
    assert graph.scores is not None
    np.testing.assert_allclose(graph.scores[:, 0], [0.8, 0.6])


def test_only_the_last_panorama_of_a_tile_counts_in_the_published_form() -> None:
    places = np.array([1, 2, 1, 2, 7])
    neighbors = np.array([[3, 4], [1, 3], [5, -1], [-1, -1], [1, 2]])
    scores = np.array([[0.8, 0.3], [0.6, 0.5], [0.7, 0], [0, 0], [0.2, 0.1]], dtype=np.float32)
    scores[neighbors < 0] = -np.inf
    graph = merge_neighbors(places, neighbors, scores, 2, last_only=True)
    # as in published code: a dictionary by tile, written panorama by panorama
    by_tile = {}
    for place, row, row_scores in zip(places.tolist(), neighbors, scores, strict=True):
        by_tile[place] = (row.tolist(), row_scores.tolist())
    assert graph.scores is not None
    rows = zip(graph.neighbors.tolist(), graph.scores.tolist(), strict=True)
    assert dict(zip(graph.place_ids.tolist(), rows, strict=True)) == by_tile
