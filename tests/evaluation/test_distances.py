from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from s4g_ray.data.sphere import metres_between
from s4g_ray.evaluation.gallery_parts import GalleryPart
from s4g_ray.evaluation.gallery_search import QuerySide
from s4g_ray.evaluation.metrics import retrieval_metrics, retrieve_both, retrieve_parts

RANKS = (1, 3, 5)


def ground(seed: int, num_queries: int = 9, num_references: int = 14) -> dict[str, Any]:
    """Make queries and references within 2 km, with embeddings that tell little."""
    rng = np.random.default_rng(seed)
    places = rng.integers(0, 6, num_references)
    return {
        "query_embeddings": rng.normal(size=(num_queries, 8)).astype(np.float32),
        "reference_embeddings": rng.normal(size=(num_references, 8)).astype(np.float32),
        "query_places": rng.choice(places, num_queries),
        "reference_places": places,
        "query_latlon": np.array([30.3, 120.3]) + rng.uniform(-0.01, 0.01, (num_queries, 2)),
        "reference_latlon": np.array([30.3, 120.3]) + rng.uniform(-0.01, 0.01, (num_references, 2)),
    }


def order_loop(given: dict[str, Any], query: int, left_out: set[int]) -> list[int]:
    """Order the references of a query by cosine, one at a time."""
    q = given["query_embeddings"][query].astype(np.float64)
    scored = []
    for row, r in enumerate(given["reference_embeddings"].astype(np.float64)):
        if row not in left_out:
            scored.append((-float(q @ r) / float(np.linalg.norm(q) * np.linalg.norm(r)), row))
    return [row for _, row in sorted(scored)]


def dense_sdm_loop(distances: list[float], k: int) -> float:
    """SDM@K of DenseUAV: equation of arXiv 2201.09201, d in degrees, s = 5e3."""
    above = 0.0
    below = 0.0
    for i in range(1, k + 1):
        weight = 1 - (i - 1) / k
        above += weight / math.exp(5e3 * distances[i - 1])
        below += weight
    return above / below


def gta_sdm_loop(distances: list[float], k: int) -> float:
    """SDM@K of GTA-UAV: arXiv 2409.16925, d in metres, s = 0.001."""
    above = 0.0
    below = 0.0
    for i in range(k):
        above += (k - i) * math.exp(-0.001 * distances[i])
        below += k - i
    return above / below


def metrics_loop(given: dict[str, Any], left_out: set[int] | None = None) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for query, (lat, lon) in enumerate(given["query_latlon"]):
        order = order_loop(given, query, left_out or set())
        points = [given["reference_latlon"][row] for row in order]
        degrees = [math.sqrt((lat - p[0]) ** 2 + (lon - p[1]) ** 2) for p in points]
        metres = [float(metres_between(lat, lon, *p)) for p in points]
        for k in RANKS:
            found.setdefault(f"sdm@{k}", []).append(dense_sdm_loop(degrees, k))
            found.setdefault(f"sdm_m@{k}", []).append(gta_sdm_loop(metres, k))
            found.setdefault(f"dis@{k}", []).append(sum(metres[:k]) / k)
    return {key: sum(values) / len(values) for key, values in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_they_equal_the_published_formulas_restated(seed: int) -> None:
    given = ground(seed)
    found = retrieval_metrics(**given, sdm_ranks=RANKS)
    wanted = metrics_loop(given)
    assert {key for key in found if key.startswith(("sdm", "dis@"))} == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-9), key


def test_all_references_at_the_querys_place_score_1_and_0_metres() -> None:
    given = ground(0)
    given["query_latlon"][:] = given["reference_latlon"][:] = (30.3, 120.3)
    found = retrieval_metrics(**given, sdm_ranks=[5])
    assert (found["sdm@5"], found["sdm_m@5"], found["dis@5"]) == (1.0, 1.0, 0.0)


def test_without_ranks_the_metrics_are_those_of_before() -> None:
    given = ground(1)
    found = retrieval_metrics(**given)
    assert not [key for key in found if key.startswith(("sdm", "dis@"))]
    with_ranks = retrieval_metrics(**given, sdm_ranks=RANKS)
    assert {key: with_ranks[key] for key in found} == found


def test_a_rank_beyond_the_gallery_and_unknown_positions_are_left_out() -> None:
    given = ground(2)
    given["query_latlon"][0] = np.nan
    found = retrieval_metrics(**given, sdm_ranks=(1, 15))
    assert "sdm@1" in found
    assert "sdm@15" not in found
    rest = {**given}
    for name in ("query_embeddings", "query_places", "query_latlon"):
        rest[name] = given[name][1:]
    assert found["dis@1"] == retrieval_metrics(**rest, sdm_ranks=[1])["dis@1"]
    given["reference_latlon"][:] = np.nan
    assert "sdm@1" not in retrieval_metrics(**given, sdm_ranks=[1])


@pytest.mark.parametrize("west", [-180.0, 180.0, -120.3])
def test_they_are_the_same_across_180_degrees(west: float) -> None:
    given = ground(3)
    wanted = retrieval_metrics(**given, sdm_ranks=RANKS)
    for name in ("query_latlon", "reference_latlon"):
        shifted: NDArray[np.float64] = given[name].copy()
        shifted[:, 1] = (shifted[:, 1] - 120.3 + west + 180) % 360 - 180
        given[name] = shifted
    found = retrieval_metrics(**given, sdm_ranks=RANKS)
    for key in (f"{name}@{k}" for name in ("sdm", "sdm_m", "dis") for k in RANKS):
        assert found[key] == pytest.approx(wanted[key], rel=1e-6), key


def test_they_do_not_depend_on_the_parts_nor_on_the_length_of_the_lists() -> None:
    given = ground(4)
    side = QuerySide(given["query_embeddings"], given["query_places"], latlon=given["query_latlon"])
    whole = GalleryPart(
        given["reference_embeddings"], given["reference_places"], given["reference_latlon"]
    )
    wanted = retrieval_metrics(**given, sdm_ranks=RANKS)
    for num_top in (0, 2, 9):
        found = retrieve_parts(
            side,
            lambda: (whole.take(slice(start, start + 3)) for start in range(0, 14, 3)),
            has_distractors=False,
            num_top=num_top,
            sdm_ranks=RANKS,
        )["strict"]
        for key, value in found.metrics().items():
            if key.startswith(("sdm", "dis@")):
                assert value == pytest.approx(wanted[key], rel=1e-12)
        assert (found.listed is None) == (num_top == 0)
        if found.listed is not None:
            assert found.listed.rows.shape == (9, num_top)


def test_the_paper_protocol_measures_without_distractors() -> None:
    given = ground(5)
    lone = np.array(
        [place not in set(given["query_places"]) for place in given["reference_places"]]
    )
    assert 0 < lone.sum() < 14
    found = retrieve_both(**given, distractors=lone, sdm_ranks=RANKS)
    for protocol, left_out in (("strict", set()), ("paper", set(np.flatnonzero(lone).tolist()))):
        metrics = found[protocol].metrics(protocol)  # type: ignore[index, arg-type]
        for key, value in metrics_loop(given, left_out).items():
            assert metrics[key] == pytest.approx(value, rel=1e-9), (protocol, key)
