from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from s4g_ray.config.schema import MiningConfig
from s4g_ray.errors import RunError
from s4g_ray.index.plan import Kind, plan_for, plan_index
from s4g_ray.index.recall import (
    RecallEstimate,
    check_recall,
    effort_range,
    matches_config,
    measure_recall,
    raise_effort,
)

KINDS: tuple[Kind, ...] = ("flat", "ivf_sq8", "hnsw")


def test_recall_is_the_mean_share_of_the_exact_ids_that_are_found() -> None:
    exact = np.array([[1, 2, 3], [4, 5, 6]])
    found = np.array([[3, 9, 1], [7, 8, 4]])
    scores = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]], np.float32)
    assert measure_recall(found, exact, scores).mean == pytest.approx(3 / 6)
    assert measure_recall(exact[:, ::-1], exact, scores).mean == 1


def test_results_that_tie_with_the_first_beyond_k_do_not_count_for_recall() -> None:
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    scores = np.array([[0.9, 0.5, 0.5, 0.5], [0.9, 0.8, 0.7, 0.6]], np.float32)
    found = np.array([[1, 11, 12], [5, 6, 13]])
    assert measure_recall(found, exact, scores).mean == pytest.approx((1 + 2 / 3) / 2)
    blank = np.full((1, 4), 0.5, np.float32)
    estimate = measure_recall(np.array([[9, 8, 7]]), exact[:1], blank)
    assert (estimate.mean, estimate.num_queries) == (1, 0)


def test_recall_is_estimated_for_each_region_too() -> None:
    exact = np.arange(12).reshape(4, 3)
    scores = np.tile(np.array([0.9, 0.8, 0.7], np.float32), (4, 1))
    found = exact.copy()
    found[3] = 99
    regions = np.array(["north", "south", "north", "south"])
    whole = measure_recall(found, exact, scores, regions)
    parts = whole.by_region
    assert whole.mean == pytest.approx(3 / 4)
    assert {name: (part.mean, part.num_queries) for name, part in parts.items()} == {
        "north": (1.0, 2),
        "south": (0.5, 2),
    }
    assert parts["south"].low < whole.low < whole.high < 1


@pytest.mark.parametrize("share", [0.5, 0.9, 0.995])
@pytest.mark.parametrize("spread", [0.0, 0.2])
@pytest.mark.parametrize("count", [30, 100])
def test_the_interval_holds_the_recall_of_all_queries_19_times_of_20(
    share: float, spread: float, count: int
) -> None:
    """Draws samples of queries whose own recalls differ, and counts how often it is right."""
    rng = np.random.default_rng(0)
    k = 20
    concentration = 1 / spread**2 if spread else 1e6
    own = rng.beta(share * concentration, (1 - share) * concentration, 20_000)
    num_found = rng.binomial(k, own)
    exact = np.arange(k)[None].repeat(count, 0)
    scores = np.linspace(1, 0.5, k, dtype=np.float32)[None].repeat(count, 0)
    held = 0
    for _ in range(200):
        chosen = num_found[rng.choice(len(num_found), count, replace=False)]
        found = np.where(np.arange(k) < chosen[:, None], exact, 99)
        estimate = measure_recall(found, exact, scores)
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        held += estimate.low <= (num_found / k).mean() <= estimate.high
    assert held >= 0.92 * 200


def test_a_perfect_sample_still_has_an_interval_that_narrows_with_its_size() -> None:
    widths = []
    for count in (16, 256, 4096):
        exact = np.arange(5)[None].repeat(count, 0)
        scores = np.linspace(1, 0.5, 5, dtype=np.float32)[None].repeat(count, 0)
        estimate = measure_recall(exact, exact, scores)
        assert (estimate.mean, estimate.high) == (1, 1)
        widths.append(1 - estimate.low)
    assert widths[0] > 10 * widths[1] > 100 * widths[2] > 0


@pytest.mark.parametrize(
    ("effort", "max_effort", "wanted", "tried", "ends"),
    [
        (1, 20, 0.5, [1, 2, 4, 8, 16], (16 / 20, 16)),
        (1, 20, 1.0, [1, 2, 4, 8, 16, 20], (1.0, 20)),  # all lists
        (8, 8, 1.0, [8], (8 / 20, 8)),  # as configured
        (None, None, 1.0, [None], (0.0, None)),  # an exact kind
    ],
)
def test_search_effort_doubles_until_recall_suffices_or_all_is_visited(
    effort: int | None,
    max_effort: int | None,
    wanted: float,
    tried: list[int | None],
    ends: tuple[float, int | None],
) -> None:
    seen: list[int | None] = []

    def recall_at(value: int | None) -> RecallEstimate:
        seen.append(value)
        mean = (value or 0) / 20 if value != 8 or wanted != 0.5 else 0.4
        return RecallEstimate(mean, 0, 1, 9)

    recall, last = raise_effort(recall_at, effort, max_effort, wanted)
    assert (recall.mean, last) == ends
    assert seen == tried


def test_search_effort_is_raised_only_where_the_configuration_leaves_it_open() -> None:
    plans = {kind: plan_index(5000, 16, kind=kind) for kind in KINDS}
    free = MiningConfig()
    fixed = MiningConfig(nprobe=3, ef_search=40)
    assert effort_range(plans["flat"], free) == (None, None)
    assert effort_range(plans["ivf_sq8"], free) == (
        plans["ivf_sq8"].nprobe,
        plans["ivf_sq8"].num_lists,
    )
    assert effort_range(plans["hnsw"], free) == (plans["hnsw"].ef_search, 5000)
    # at most the number of vectors of a shard
    assert effort_range(replace(plans["hnsw"], num_shards=3), free)[1] == 1667
    assert effort_range(plan_index(10**6, 16, kind="hnsw"), free)[1] == 16_384
    large = plan_index(10**8, 16, kind="ivf_sq8")
    assert (
        effort_range(large, free)[1],
        effort_range(large, MiningConfig(gpus_per_shard=1))[1],
    ) == (16_384, 2048)
    assert effort_range(plan_index(5000, 16, kind="ivf_sq8", nprobe=3), fixed) == (3, None)
    assert effort_range(plan_index(5000, 16, kind="hnsw", ef_search=40), fixed) == (40, None)


def estimate(mean: float) -> RecallEstimate:
    return RecallEstimate(mean, mean - 0.05, mean + 0.05, 99)


def test_recall_below_the_minimum_is_refused_with_the_remedy() -> None:
    plan = plan_index(5000, 16, kind="ivf_sq8", nprobe=3)
    cfg = MiningConfig(min_recall=0.9)
    check_recall(estimate(0.9), 3, plan, cfg, 10)
    with pytest.raises(
        RunError,
        match=r"recall@10 of the ivf_sq8 index at nprobe=128 is 0\.899 \(0\.849 to 0\.949 by 99"
        r" queries\), below .*=0\.9; set",
    ):
        check_recall(estimate(0.899), 128, plan, cfg, 10)
    with pytest.raises(
        RunError, match=r"at nprobe=3 is 0\.500 .*; raise mining.nprobe, or leave it out"
    ):
        check_recall(estimate(0.5), 3, plan, cfg.model_copy(update={"nprobe": 3}), 10)
    with pytest.raises(
        RunError, match=r"of the sqfp16 index is 0\.500 .*; set mining.index_kind to a more exact"
    ):
        check_recall(estimate(0.5), None, plan_index(5000, 16, kind="sqfp16"), cfg, 10)


def manifest(
    made: dict[str, Any], effort: int | None, recall: float | None = 0.95
) -> dict[str, Any]:
    cfg = MiningConfig(**made)
    plan = asdict(plan_for(cfg, 400_000, 16))
    return {"plan": plan, "effort": effort, "recall": recall}


@pytest.mark.parametrize(
    ("made", "effort", "asked", "fits"),
    [
        ({}, None, {"index_threads": 8, "recall_sample": 3, "nprobe": 1}, True),
        ({"index_kind": "flat"}, None, {"index_kind": "auto"}, True),
        ({}, None, {"num_shards": 2}, False),
        ({}, None, {"num_shards": 1}, True),
        ({"num_shards": 2}, None, {}, True),  # as auto once chose
        ({}, None, {"index_kind": "sqfp16"}, False),
        ({}, None, {"index_memory_gb": 1.0}, True),
        ({}, None, {"index_memory_gb": 0.02}, False),
        ({}, None, {"max_search_hours": 1e-6}, True),  # the choice stays, whatever the rates
        ({}, None, {"min_recall": 0.96}, False),
        ({"index_kind": "ivf_sq8"}, 128, {"index_kind": "ivf_sq8"}, True),  # raised from 64
        ({"index_kind": "ivf_sq8"}, 128, {"index_kind": "ivf_sq8", "nprobe": 64}, False),
        ({"index_kind": "ivf_sq8"}, 128, {"index_kind": "ivf_sq8", "nprobe": 128}, True),
        ({"index_kind": "ivf_sq8", "nprobe": 128}, 128, {"index_kind": "ivf_sq8"}, True),
        ({"index_kind": "ivf_sq8"}, 1024, {"nprobe": 10**6}, True),  # all lists
        (
            {"index_kind": "hnsw", "ef_search": 300},
            300,
            {"index_kind": "hnsw", "ef_search": 400},
            False,
        ),
        ({"index_kind": "hnsw", "ef_search": 300}, 300, {"index_kind": "hnsw"}, True),
        ({"index_kind": "ivf_rabitq"}, 64, {"gpus_per_shard": 1}, False),
        ({"index_kind": "ivf_sq8"}, 64, {"gpus_per_shard": 1}, True),
    ],
)
def test_a_version_matches_a_configuration_that_allows_it(
    made: dict[str, Any], effort: int | None, asked: dict[str, Any], fits: bool
) -> None:
    assert matches_config(manifest(made, effort), MiningConfig(**asked)) is fits


def test_a_version_whose_recall_was_not_measured_matches() -> None:
    assert matches_config(manifest({}, None, recall=None), MiningConfig(min_recall=1))
