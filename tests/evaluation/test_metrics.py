from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from s4g_ray.data.sphere import metres_between
from s4g_ray.errors import RunError
from s4g_ray.evaluation.metrics import PROTOCOLS, retrieval_metrics, retrieve
from s4g_ray.evaluation.ranking import normalise


def scores_loop(q: NDArray[Any], r: NDArray[Any]) -> list[list[float]]:
    """Compute cosines one at a time, in float64."""
    unit = [x / np.linalg.norm(x) for x in r.astype(np.float64)]
    return [
        [float((query / np.linalg.norm(query) * x).sum()) for x in unit]
        for query in q.astype(np.float64)
    ]


def rank_loop(scores: list[float], among: set[int], ignored: set[int], protocol: str) -> int:
    """Rank the best of the references `among`, from 1, among all not ignored; 0 without any."""
    if not among:
        return 0
    best = max(scores[i] for i in among)
    others = [s for i, s in enumerate(scores) if i not in among | ignored]
    return 1 + sum(s >= best if protocol == "strict" else s > best for s in others)


def ap_loop(scores: list[float], own: set[int], protocol: str) -> float:
    """Compute trapezoid average precision: walk down the ranking, own references one by one."""
    area = 0.0
    for found, best in enumerate(sorted((scores[i] for i in own), reverse=True)):
        others = [s for i, s in enumerate(scores) if i not in own]
        above = found + sum(s >= best if protocol == "strict" else s > best for s in others)
        area += ((found + 1) / (above + 1) + (found / above if above else 1.0)) / 2
    return area / len(own)


def metrics_loop(
    scores: list[list[float]],
    query_places: list[int],
    reference_places: list[int],
    semi: list[list[int]],
    metres: NDArray[np.float64],
    protocol: str,
) -> dict[str, float]:
    """Compute all metrics query by query."""
    rows: dict[str, list[float]] = {}
    for q, place in enumerate(query_places):
        own = {i for i, other in enumerate(reference_places) if other == place}
        if not own:
            continue
        near_own = {
            i for i, other in enumerate(reference_places) if other in semi[q] and other != place
        }
        rank = rank_loop(scores[q], own, set(), protocol)
        values = {f"recall@{k}": float(rank <= k) for k in (1, 5, 10)}
        values["ap"] = ap_loop(scores[q], own, protocol)
        values["hit_rate"] = float(rank_loop(scores[q], own, near_own, protocol) == 1)
        values["hit_rate_literal"] = float(
            rank_loop(scores[q], own | near_own, set(), protocol) == 1
        )
        for radius in (50, 100):
            inside = {i for i in range(len(reference_places)) if metres[q, i] <= radius}
            rank = rank_loop(scores[q], inside, set(), protocol)
            values |= {f"recall@{k}_within_{radius}m": float(0 < rank <= k) for k in (1, 5)}
        for key, value in values.items():
            rows.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in rows.items()}


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 25),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(2, 6),
    st.integers(0, 10**6),
)
def test_metrics_of_both_protocols_equal_a_plain_loop(
    num_q: int, num_r: int, places: int, dim: int, seed: int
) -> None:
    """Vectors are drawn from a pool of five, so there are many exact ties."""
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(5, dim)).astype(np.float32)
    q = pool[rng.integers(0, 5, num_q)]
    r = pool[rng.integers(0, 5, num_r)]
    query_places = rng.integers(0, places, num_q)
    reference_places = rng.integers(0, places, num_r)
    semi = [rng.integers(0, places + 2, rng.integers(0, 4)).tolist() for _ in range(num_q)]
    lat_q = rng.integers(0, 9, num_q) * 3e-4  # 33 m steps
    lat_r = rng.integers(0, 9, num_r) * 3e-4
    # References without coordinates are never within a radius; ranked first, they are a miss.
    lat_r[rng.random(num_r) < 0.2] = np.nan
    metres = metres_between(lat_q[:, None], 0, lat_r[None, :], 0)
    scores = scores_loop(q, r)
    for protocol in PROTOCOLS:
        wanted = metrics_loop(
            scores,
            query_places.tolist(),
            reference_places.tolist(),
            semi,
            metres,
            protocol,
        )
        if not wanted:
            with pytest.raises(RunError, match="no query has a reference"):
                retrieval_metrics(q, r, query_places, reference_places, protocol=protocol)
            continue
        found = retrieval_metrics(
            q,
            r,
            query_places,
            reference_places,
            ranks=(1, 5, 10),
            semi_positives=semi,
            radii_m=(50, 100),
            query_latlon=np.stack([lat_q, 0 * lat_q], 1),
            reference_latlon=np.stack([lat_r, 0 * lat_r], 1),
            protocol=protocol,
        )
        if not any(set(s) - {p} for s, p in zip(semi, query_places.tolist(), strict=True)):
            wanted = {k: v for k, v in wanted.items() if "hit_rate" not in k}
        assert {key: found[key] for key in wanted} == pytest.approx(wanted)
        assert found["queries_without_reference"] == num_q - found["queries"]


def test_random_embeddings_equal_a_plain_loop_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s4g_ray.evaluation.gallery_search.BLOCK_SCORES", 700)
    rng = np.random.default_rng(0)
    q = rng.normal(size=(90, 16)).astype(np.float32)
    r = rng.normal(size=(120, 16)).astype(np.float32)
    query_places = rng.integers(0, 100, 90)
    reference_places = rng.integers(0, 100, 120)
    found = retrieve(q, r, query_places, reference_places)
    own = [set(np.flatnonzero(reference_places == place).tolist()) for place in query_places]
    wanted = [rank_loop(s, o, set(), "strict") for s, o in zip(scores_loop(q, r), own, strict=True)]
    assert found.ranks.tolist() == [wanted, wanted]


@pytest.mark.parametrize("threads", [1, 3])
def test_many_own_references_among_a_long_gallery_equal_a_plain_loop(threads: int) -> None:
    """Vectors from a pool, so there are many ties; more references than COLUMNS_AT_ONCE."""
    rng = np.random.default_rng(6)
    pool = rng.normal(size=(300, 8)).astype(np.float32)
    q = pool[rng.integers(0, 300, 12)]
    r = pool[rng.integers(0, 300, 1300)]
    query_places = np.arange(12)
    reference_places = rng.integers(0, 40, 1300)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {
            p: retrieval_metrics(q, r, query_places, reference_places, protocol=p)
            for p in PROTOCOLS
        }
        top = retrieve(q, r, query_places, reference_places).top
    finally:
        torch.set_num_threads(before)
    scores = scores_loop(q, r)
    assert [scores[i][column] for i, column in enumerate(top)] == pytest.approx(
        [max(row) for row in scores]
    )
    for protocol in PROTOCOLS:
        rounded = [[round(score, 12) for score in row] for row in scores]
        wanted = metrics_loop(
            rounded,
            query_places.tolist(),
            reference_places.tolist(),
            [[]] * 12,
            np.full((12, 1300), np.inf),
            protocol,
        )
        for key in ("recall@1", "recall@5", "recall@10", "ap"):
            assert found[protocol][key] == pytest.approx(wanted[key]), key


@pytest.mark.parametrize("count", [17, 550])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_constant_embeddings_have_no_recall(count: int, value: float) -> None:
    places = np.arange(count)
    vector = np.float32(value) * np.linspace(0.1, 1, 37, dtype=np.float32)
    constant = np.tile(vector, (count, 1))
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
        # Reference `rank - 1` scores lowest of those above 0.
        q[row, :rank] = np.linspace(2, 1, rank)
    places = np.array([0, 2, 3, 49])
    metrics = retrieval_metrics(q, r, places, np.arange(count))
    assert metrics["recall@1%"] == 0.5
    assert metrics["recall@1"] == 0.25


def entry_of_published_curve(
    q: NDArray[Any], r: NDArray[Any], query_places: list[int], labels: list[int]
) -> float:
    """Compute the entry of recall@1 % of University-1652's curve; references of label -1 are junk.

    Each query sorts the gallery, drops the junk, and marks the curve from its first own reference
    on. The curve has an entry for each reference, junk included, and its entry is counted from 0.
    """
    curve = [0] * len(labels)
    for row, place in zip(scores_loop(q, r), query_places, strict=True):
        ranking = sorted(range(len(labels)), key=lambda i: -row[i])
        kept = [labels[i] for i in ranking if labels[i] != -1]
        for at in range(kept.index(place), len(curve)):
            curve[at] += 1
    return curve[round(0.01 * len(labels))] / len(query_places)


@pytest.mark.parametrize(("num_places", "num_junk", "own"), [(251, 100, 1), (60, 22, 5)])
def test_paper_takes_recall_at_one_percent_of_a_gallery_with_distractors_from_university(
    num_places: int, num_junk: int, own: int
) -> None:
    rng = np.random.default_rng(3)
    reference_places = np.repeat(np.arange(num_places + num_junk), own)
    is_junk = reference_places >= num_places
    r = rng.normal(size=(len(reference_places), 12)).astype(np.float32)
    query_places = np.arange(num_places)
    q = r[query_places * own] + rng.normal(0, 0.9, (num_places, 12)).astype(np.float32)
    labels = np.where(is_junk, -1, reference_places).tolist()
    wanted = entry_of_published_curve(q, r, query_places.tolist(), labels)
    found = {
        protocol: retrieval_metrics(
            q, r, query_places, reference_places, protocol=protocol, distractors=is_junk
        )
        for protocol in PROTOCOLS
    }
    assert found["paper"]["recall@1%"] == pytest.approx(wanted)
    assert found["strict"]["recall@1%"] != pytest.approx(wanted)
    kept = retrieval_metrics(q, r[~is_junk], query_places, reference_places[~is_junk])
    assert kept["recall@1%"] < wanted  # k = R // 100 of the others alone


def test_median_error_is_the_distance_to_the_best_reference() -> None:
    r = np.eye(3, dtype=np.float32)
    places = np.arange(3)
    where = np.array([[0.0, 179.9], [0.0, -179.9], [60.0, 10.0]])
    metrics = retrieval_metrics(
        r[[1, 1, 2]], r, places, places, query_latlon=where, reference_latlon=where
    )
    wanted = np.median([float(metres_between(0, 179.9, 0, -179.9)), 0, 0])
    assert metrics["median_error_m"] == pytest.approx(wanted)
    assert float(metres_between(0, 179.9, 0, -179.9)) == pytest.approx(22_239, abs=1)
    unknown = np.full((3, 2), np.nan)
    assert "median_error_m" not in retrieval_metrics(
        r, r, places, places, query_latlon=unknown, reference_latlon=where
    )


def test_the_best_of_several_references_counts_and_no_reference_at_all_is_an_error() -> None:
    r = np.array([[1, 0], [0, 1], [0.9, 0.1]], dtype=np.float32)
    q = np.array([[0, 1]], dtype=np.float32)
    assert retrieve(q, r, np.array([5]), np.array([5, 5, 6])).ranks.tolist() == [[1], [1]]
    with pytest.raises(RunError, match="no query has a reference"):
        retrieval_metrics(q, r, np.array([9]), np.array([5, 5, 6]))
    with pytest.raises(ValueError, match="D differs"):
        retrieve(q, np.ones((3, 3), dtype=np.float32), np.array([9]), np.array([5, 5, 6]))


def test_paper_ranks_the_own_reference_before_ties_and_leaves_distractors_out() -> None:
    r = np.array([[1, 0], [1, 0], [0, 1], [0.9, 0.1]], dtype=np.float32)
    q = np.array([[1, 0], [0.6, 0.8]], dtype=np.float32)
    places = np.array([1, 2, 3, 4])
    query_places = np.array([1, 4])
    distractors = np.array([False, False, True, False])
    found = {
        protocol: retrieval_metrics(
            q, r, query_places, places, protocol=protocol, distractors=distractors
        )
        for protocol in PROTOCOLS
    }
    assert (found["strict"]["recall@1"], found["paper"]["recall@1"]) == (0, 1)
    assert (found["strict"]["references"], found["paper"]["references"]) == (4, 3)


def test_hit_rates_differ_where_a_negative_ranks_between_a_semi_positive_and_the_own_tile() -> None:
    """Rankings: query 0: semi, other, own; query 1: semi, own, other; query 2: other, own."""
    r = np.eye(4, dtype=np.float32)
    q = np.array([[0.5, 0.9, 0.7, 0], [0.5, 0.9, 0.3, 0], [0.5, 0.1, 0, 0.9]], dtype=np.float32)
    semi = [[11], [11], [11]]
    found = retrieval_metrics(
        q, r, np.array([10, 10, 10]), np.array([10, 11, 12, 13]), semi_positives=semi
    )
    assert found["recall@1"] == 0
    assert found["hit_rate"] == pytest.approx(1 / 3)
    assert found["hit_rate_literal"] == pytest.approx(2 / 3)


def test_metrics_of_chosen_rows_equal_those_of_these_queries_alone() -> None:
    rng = np.random.default_rng(2)
    q = rng.normal(size=(30, 4)).astype(np.float32)
    r = rng.normal(size=(30, 4)).astype(np.float32)
    places = np.arange(30)
    chosen = rng.random(30) < 0.4
    of_chosen = retrieve(q, r, places, places).metrics("strict", rows=chosen)
    alone = retrieve(q[chosen], r, places[chosen], places).metrics("strict")
    assert of_chosen == alone
    assert of_chosen["queries"] == chosen.sum()


def test_memory_stays_far_below_the_matrix_of_all_scores() -> None:
    """Half as many images as CVACT's test set: 46,401 x 46,401 scores would take 8.6 GB.

    Short vectors keep the test short.
    """
    script = """
import resource, numpy as np
from s4g_ray.evaluation.metrics import retrieve
rng = np.random.default_rng(0)
count = 46_401
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
latlon = np.stack([rng.uniform(-35.4, -35.2, count), rng.uniform(149.0, 149.2, count)], axis=1)
r = rng.standard_normal((count, 16), dtype=np.float32)
q = r + rng.standard_normal((count, 16), dtype=np.float32)
places = np.arange(count)
small = slice(0, 50)
retrieve(
    q[small], r[small], places[small], places[small],
    query_latlon=latlon[small], reference_latlon=latlon[small],
)
before = peak()
found = retrieve(
    q, r, places, places, query_latlon=latlon, reference_latlon=latlon, radii_m=(5,)
).metrics()
print(peak() - before, found["recall@1"], found["recall@1_within_5m"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    gigabytes, recall, within = map(float, done.stdout.split())
    assert gigabytes < 1
    assert 0.05 < recall <= within < 1


@pytest.mark.parametrize("own", [1, 12])
def test_nearly_equal_embeddings_are_ranked_exactly_in_little_memory(
    own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scores are near-ties, so they cannot be compared pair by pair."""
    monkeypatch.setattr("s4g_ray.evaluation.ranking.MAX_NEAR_TIES", 3)
    monkeypatch.setattr("s4g_ray.evaluation.ranking.THRESHOLDS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    pool = (np.ones(24) + 1e-4 * rng.normal(size=(40, 24))).astype(np.float32)
    q = pool[rng.integers(0, 40, 20)]
    r = pool[rng.integers(0, 40, 60)]
    query_places = rng.integers(0, 60 // own, 20)
    reference_places = np.arange(60) // own
    for protocol in PROTOCOLS:
        # Normalised as retrieve does: otherwise rounding to float32 would decide the ties.
        unit_q = normalise(q, np.arange(len(q)), "").astype(np.float64)
        unit_r = normalise(r, np.arange(len(r)), "").astype(np.float64)
        scores = [[float(np.dot(a, b)) for b in unit_r] for a in unit_q]
        rounded = [[round(s, 12) for s in row] for row in scores]
        wanted = metrics_loop(
            rounded,
            query_places.tolist(),
            reference_places.tolist(),
            [[]] * 20,
            np.full((20, 60), np.inf),
            protocol,
        )
        found = retrieval_metrics(q, r, query_places, reference_places, protocol=protocol)
        for key in ("recall@1", "recall@5", "recall@10", "ap"):
            assert found[key] == pytest.approx(wanted[key]), key


def test_collapsed_embeddings_of_many_own_references_take_little_memory() -> None:
    """As University-1652, satellite to drone: 54 own references a query; scores nearly equal."""
    script = """
import resource, numpy as np
from s4g_ray.evaluation.metrics import retrieve
rng = np.random.default_rng(0)
def embeddings(n): return (1 + 1e-6 * rng.standard_normal((n, 64), dtype=np.float32))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
q, r = embeddings(60), embeddings(6000)
places = np.arange(6000) // 54
retrieve(q[:3], r[:200], np.arange(3), places[:200])
before = peak()
found = retrieve(q, r, np.arange(60), places).metrics()
print(peak() - before, found["recall@10"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    gigabytes, recall = map(float, done.stdout.split())
    assert gigabytes < 0.3
    assert recall < 1


def test_a_first_reference_without_coordinates_is_a_miss_within_any_radius() -> None:
    r = np.eye(2, dtype=np.float32)
    q = r[[0, 0]]
    where = np.array([[np.nan, np.nan], [10.0, 10.0]])
    found = retrieval_metrics(
        q,
        r,
        np.array([1, 0]),
        np.arange(2),
        query_latlon=np.array([[10.0, 10.0]] * 2),
        reference_latlon=where,
    )
    assert (found["recall@1_within_50m"], found["recall@5_within_50m"]) == (0, 1)
    assert "median_error_m" not in found


def test_vectors_of_any_norm_are_ranked_by_their_direction() -> None:
    directions = np.array([[1, 0], [1, 1], [0, 1]], dtype=np.float32)
    r = directions * np.array([[1e-25], [1e20], [1e-20]], dtype=np.float32)
    found = retrieve(directions * np.float32(1e19), r, np.arange(3), np.arange(3))
    assert found.ranks.tolist() == [[1, 1, 1], [1, 1, 1]]
    np.testing.assert_allclose(np.linalg.norm(normalise(r, np.arange(3), ""), axis=1), 1, rtol=1e-6)
