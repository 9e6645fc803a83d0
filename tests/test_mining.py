from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.mining import merge_neighbors
from s4g_ray.neighbors import PlacePairs


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 6), st.integers(0, 10**6))
def test_merging_equals_dictionaries_of_best_scores(num_queries: int, width: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    query_places = rng.integers(0, 5, num_queries)
    found = rng.integers(0, 9, (num_queries, width))
    scores = rng.integers(-3, 4, (num_queries, width)).astype(np.float32)
    graph = merge_neighbors(query_places, found, scores, k)
    best: dict[int, dict[int, float]] = {int(place): {} for place in query_places}
    for place, places, values in zip(query_places.tolist(), found.tolist(), scores.tolist(), strict=True):
        for other, value in zip(places, values, strict=True):
            if other != place:
                best[place][other] = max(best[place].get(other, -np.inf), value)
    assert graph.place_ids.tolist() == sorted(best)
    assert graph.scores is not None
    for row, place in enumerate(sorted(best)):
        wanted = sorted(best[place].items(), key=lambda item: (-item[1], item[0]))[:k]
        padded = [other for other, _ in wanted] + [-1] * (k - len(wanted))
        assert graph.neighbors[row].tolist() == padded
        assert graph.scores[row, : len(wanted)].tolist() == [value for _, value in wanted]


def test_the_neighbors_of_all_panoramas_of_a_tile_are_merged_and_semi_positives_are_left_out() -> None:
    """Tile 1 has two panoramas; the second must not overwrite what the first found."""
    query_places = np.array([1, 2, 1])
    found = np.array([[1, 3, 4], [2, 1, 3], [1, 5, 3]])
    scores = np.array([[0.9, 0.8, 0.3], [0.9, 0.6, 0.5], [0.9, 0.7, 0.4]], dtype=np.float32)
    graph = merge_neighbors(query_places, found, scores, 3)
    assert graph.neighbors.tolist() == [[3, 5, 4], [1, 3, -1]]
    barred = PlacePairs.of(np.array([3, 2]), np.array([1, 1]))
    graph = merge_neighbors(query_places, found, scores, 3, barred)
    assert graph.neighbors.tolist() == [[5, 4, -1], [3, -1, -1]]
    assert graph.scores is not None
    np.testing.assert_allclose(graph.scores[:, 0], [0.7, 0.5])
