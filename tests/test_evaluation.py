from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from s4g_ray.errors import RunError
from s4g_ray.evaluation import retrieval_metrics, retrieval_ranks
from s4g_ray.neighbors import metres_between


def rank_loop(q: NDArray[Any], r: NDArray[Any], query_places: list[int], reference_places: list[int]) -> list[int]:
    """Ranks one score at a time, in float64, ties against the query; 0 without a reference."""
    ranks = []
    for query, place in zip(q.astype(np.float64), query_places, strict=True):
        scores = [float((query / np.linalg.norm(query) * (x / np.linalg.norm(x))).sum()) for x in r.astype(np.float64)]
        own = [s for s, other in zip(scores, reference_places, strict=True) if other == place]
        others = [s for s, other in zip(scores, reference_places, strict=True) if other != place]
        ranks.append(1 + sum(s >= max(own) for s in others) if own else 0)
    return ranks


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 25), st.integers(1, 40), st.integers(1, 12), st.integers(2, 6), st.integers(0, 10**6))
def test_ranks_and_recall_equal_a_plain_loop(num_q: int, num_r: int, places: int, dim: int, seed: int) -> None:
    """Vectors are drawn from a handful: many exact ties."""
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(5, dim)).astype(np.float32)
    q, r = pool[rng.integers(0, 5, num_q)], pool[rng.integers(0, 5, num_r)]
    query_places, reference_places = rng.integers(0, places, num_q), rng.integers(0, places, num_r)
    wanted = rank_loop(q, r, query_places.tolist(), reference_places.tolist())
    assert retrieval_ranks(q, r, query_places, reference_places).ranks.tolist() == wanted
    counted = [rank for rank in wanted if rank]
    if counted:
        metrics = retrieval_metrics(q, r, query_places, reference_places)
        for k in (1, 5, 10):
            assert metrics[f"recall@{k}"] == pytest.approx(sum(x <= k for x in counted) / len(counted))
        assert metrics["queries_without_reference"] == num_q - len(counted)


def test_random_embeddings_equal_a_plain_loop_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s4g_ray.evaluation.BLOCK_SCORES", 700)
    rng = np.random.default_rng(0)
    q, r = rng.normal(size=(90, 16)).astype(np.float32), rng.normal(size=(120, 16)).astype(np.float32)
    query_places, reference_places = rng.integers(0, 100, 90), rng.integers(0, 100, 120)
    found = retrieval_ranks(q, r, query_places, reference_places)
    assert found.ranks.tolist() == rank_loop(q, r, query_places.tolist(), reference_places.tolist())


@pytest.mark.parametrize("count", [17, 550])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_constant_embeddings_score_nothing(count: int, value: float) -> None:
    places = np.arange(count)
    constant = np.full((count, 37), value, dtype=np.float32) * np.linspace(0.1, 1, 37, dtype=np.float32)
    metrics = retrieval_metrics(constant, constant, places, places)
    assert (metrics["recall@1"], metrics["recall@5"], metrics["recall@10"]) == (0, 0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_embeddings_are_refused(bad: float, side: int) -> None:
    embeddings = np.ones((2, 3, 4), dtype=np.float32)
    embeddings[side, 1, 2] = bad
    with pytest.raises(RunError, match="not finite; the first is row 1"):
        retrieval_metrics(embeddings[0], embeddings[1], np.arange(3), np.arange(3))


def test_recall_at_one_percent_counts_one_in_a_hundred_references() -> None:
    count = 300
    r = np.eye(count, dtype=np.float32)
    q = np.zeros((4, count), dtype=np.float32)
    for row, rank in enumerate((1, 3, 4, 50)):
        q[row, :rank] = np.linspace(2, 1, rank)  # the reference `rank - 1` scores lowest of those above 0
    places = np.array([0, 2, 3, 49])
    metrics = retrieval_metrics(q, r, places, np.arange(count))
    assert metrics["recall@1%"] == 0.5
    assert metrics["recall@1"] == 0.25


def test_median_error_is_the_distance_to_the_best_reference() -> None:
    r, places = np.eye(3, dtype=np.float32), np.arange(3)
    where = np.array([[0.0, 179.9], [0.0, -179.9], [60.0, 10.0]])
    metrics = retrieval_metrics(r[[1, 1, 2]], r, places, places, query_latlon=where, reference_latlon=where)
    wanted = np.median([float(metres_between(0, 179.9, 0, -179.9)), 0, 0])
    assert metrics["median_error_m"] == pytest.approx(wanted)
    assert float(metres_between(0, 179.9, 0, -179.9)) == pytest.approx(22_239, abs=1)
    unknown = np.full((3, 2), np.nan)
    assert "median_error_m" not in retrieval_metrics(r, r, places, places, query_latlon=unknown, reference_latlon=where)


def test_several_references_count_by_the_best_and_nothing_to_evaluate_is_an_error() -> None:
    r = np.array([[1, 0], [0, 1], [0.9, 0.1]], dtype=np.float32)
    q = np.array([[0, 1]], dtype=np.float32)
    assert retrieval_ranks(q, r, np.array([5]), np.array([5, 5, 6])).ranks.tolist() == [1]
    with pytest.raises(RunError, match="no query has a reference"):
        retrieval_metrics(q, r, np.array([9]), np.array([5, 5, 6]))
    with pytest.raises(ValueError, match="D differs"):
        retrieval_ranks(q, np.ones((3, 3), dtype=np.float32), np.array([9]), np.array([5, 5, 6]))
