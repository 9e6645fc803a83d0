"""The choice of kind and shards from room, hardware and expected time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.config.schema import MiningConfig
from s4g_ray.index.cost import Rates, expected_cost, recorded_rates
from s4g_ray.index.plan import IndexPlan, Resources, plan_for, plan_index

ORDER = ("flat", "sqfp16", "ivf_sq8", "ivf_rabitq")


def nodes(count: int, gb: float, cores: float = 16, gpus: float = 0, gpu_gb: Any = None) -> Any:
    return Resources((gb,) * count, (cores,) * count, (gpus,) * count, gpu_gb)


def hours(plan: IndexPlan, threads: int = 2, gpu: bool = False) -> float:
    rates = recorded_rates(plan.kind, plan.dim, threads, gpu=gpu)
    return expected_cost(plan, rates, num_queries=plan.num_vectors).search_s / 3600


@pytest.mark.parametrize(
    ("num_vectors", "resources", "keys", "kind", "num_shards"),
    [
        (10_000, None, {}, "flat", 1),
        (10_000, nodes(8, 64), {}, "flat", 1),
        (10**6, None, {}, "ivf_sq8", 1),
        (10**6, nodes(1, 64, cores=8), {}, "flat", 4),
        (10**6, nodes(1, 64, cores=8), {"max_search_hours": 2}, "ivf_sq8", 1),
        (10**6, nodes(1, 64, cores=8), {"max_search_hours": 100}, "flat", 1),
        (10**6, nodes(1, 64, cores=8), {"num_shards": 2}, "ivf_sq8", 2),
        (10**6, nodes(1, 64, cores=8), {"index_kind": "ivf_rabitq"}, "ivf_rabitq", 1),
        (10**6, nodes(4, 4, cores=8), {"max_search_hours": 100}, "flat", 4),
        (10**6, nodes(3, 4, cores=8), {"max_search_hours": 100}, "sqfp16", 2),
        (10**7, nodes(8, 500, cores=64), {}, "ivf_sq8", 10),
        (10**8, nodes(2, 64, cores=64), {}, "ivf_rabitq", 64),
        (10**7, nodes(8, 500, 64, 8, 80), {"gpus_per_shard": 1}, "flat", 2),
    ],
)
def test_auto_takes_what_fits_in_memory_and_time(
    num_vectors: int, resources: Any, keys: Any, kind: str, num_shards: int
) -> None:
    plan = plan_for(MiningConfig(**keys), num_vectors, 1024, resources)
    assert (plan.kind, plan.num_shards) == (kind, num_shards)


@settings(deadline=None, max_examples=60)
@given(
    num_vectors=st.integers(1, 10**9),
    dim=st.sampled_from([64, 1024]),
    count=st.integers(1, 20),
    gb=st.floats(1, 1000),
    cores=st.integers(1, 128),
    limit=st.sampled_from([0.1, 4.0, 1000.0]),
)
def test_the_choice_fits_and_nothing_more_exact_or_in_fewer_shards_would_do(
    num_vectors: int, dim: int, count: int, gb: float, cores: int, limit: float
) -> None:
    cfg = MiningConfig(max_search_hours=limit)
    room = nodes(count, gb, cores)
    held = min(count * max(cores // 2, 1), num_vectors, 1024)

    def candidates(kind: str) -> list[IndexPlan]:
        """Return a kind in all numbers of shards that fit in memory; ivf_rabitq in 4 bits."""
        plan = plan_index(num_vectors, dim, kind=kind)  # type: ignore[arg-type]
        every = [replace(plan, num_shards=shards) for shards in range(1, held + 1)]
        return [p for p in every if count * math.floor(gb / p.peak_gb) >= p.num_shards]

    fitting = {kind: candidates(kind) for kind in ORDER}
    try:
        plan = plan_for(cfg, num_vectors, dim, room)
    except ValueError:
        assert not any(fitting.values())
        return
    assert plan.num_shards <= held
    assert count * math.floor(gb / plan.peak_gb) >= plan.num_shards
    assert f"{plan.kind} in {plan.num_shards} shard" in plan.reason
    slowdown = max(1, plan.num_shards * 2 / (count * cores))
    if hours(plan) * slowdown > limit:
        assert "nothing that fits is faster" in plan.reason
    better = ORDER[: ORDER.index(plan.kind)]
    if hours(plan) * slowdown <= limit and plan.bits != 1:
        for kind in better:
            for other in fitting[kind]:
                slower = max(1, other.num_shards * 2 / (count * cores))
                assert hours(other) * slower > limit
        for other in fitting[plan.kind]:
            if other.num_shards < plan.num_shards:
                assert hours(other) * max(1, other.num_shards * 2 / (count * cores)) > limit


def test_the_reason_is_a_sentence_with_memory_hours_and_what_is_too_slow() -> None:
    plan = plan_for(MiningConfig(), 10**6, 1024)
    assert plan.reason == (
        "ivf_sq8 in 1 shard: 1.56 GB a version, a shard up to 5.19 GB, 68.5 min to search 1,000,000"
        " queries; sqfp16 would take 14.9 h, above mining.max_search_hours=4"
    )
    exact = plan_for(MiningConfig(max_search_hours=20), 10**6, 1024)
    assert exact.reason.endswith("; the most exact kind that fits")
    slow = plan_for(MiningConfig(index_kind="flat"), 10**6, 1024)
    assert slow.reason.endswith(
        "14.9 h to search 1,000,000 queries, above mining.max_search_hours=4: nothing that fits is"
        " faster"
    )
    few = plan_for(MiningConfig(), 10**6, 1024, num_queries=1000)
    assert (few.kind, "to search 1,000 queries" in few.reason) == ("flat", True)
    cfg = MiningConfig(gpus_per_shard=1, index_kind="ivf_sq8", nprobe=5000)
    capped = plan_for(cfg, 10**8, 64)
    assert capped.nprobe == 2048
    assert (
        "; mining.nprobe=5000 is lowered to 2048: a GPU visits at most 2048 lists" in capped.reason
    )


def test_measured_rates_replace_recorded_ones() -> None:
    fast = {"flat": Rates(2, product=1e-14)}
    assert plan_for(MiningConfig(), 10**6, 1024, rates=fast).kind == "flat"
    slow = {"flat": Rates(2, product=1e-8), "sqfp16": Rates(2, product=1e-8)}
    assert plan_for(MiningConfig(), 10**5, 1024, rates=slow).kind == "ivf_sq8"


def test_what_fits_nowhere_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(
        ValueError,
        match=r"100,000,000 vectors of D=1024 as ivf_rabitq in 8 shards need 9\.\d+ GB a shard; the"
        r" nodes have 4 GB free: add nodes, raise mining.num_shards",
    ):
        plan_for(MiningConfig(num_shards=8), 10**8, 1024, nodes(1, 4))
    with pytest.raises(ValueError, match=r"need 12\.8 GB a shard and 10\.2 GB of a GPU's 8; the"):
        plan_for(
            MiningConfig(index_kind="flat", gpus_per_shard=1),
            10**6,
            1024,
            nodes(1, 64, gpus=1, gpu_gb=8.0),
        )
    with pytest.raises(ValueError, match=r"no node can hold a shard of mining.gpus_per_shard=1; l"):
        plan_for(MiningConfig(gpus_per_shard=1), 10**6, 64, nodes(0, 0))
    with pytest.raises(ValueError, match=r"over memory_gb=0\.1; raise mining.index_memory_gb"):
        plan_for(MiningConfig(index_memory_gb=0.1), 10**6, 1024, nodes(1, 64))


def test_auto_takes_as_many_shards_as_the_free_cpus_of_the_nodes_with_memory_allow() -> None:
    cfg = MiningConfig(cpus_per_shard=2, index_kind="flat", max_search_hours=1e-9)
    room = replace(nodes(2, 500), free_cpus=(5.0, 2.0))
    assert plan_for(cfg, 10**6, 1024, room).num_shards == 3
    assert plan_for(cfg, 10**6, 1024, replace(room, memory_gb=(500.0, 0.1))).num_shards == 2
    busy = replace(room, free_cpus=(0.0, 0.0))
    assert plan_for(cfg, 10**6, 1024, busy).num_shards == 1  # waits for CPUs
    unlimited = cfg.model_copy(update={"cpus_per_shard": 0})
    assert plan_for(unlimited, 10**6, 1024, busy).num_shards == 16


def test_more_shards_than_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="num_shards=500 exceeds the 100 vectors"):
        plan_for(MiningConfig(num_shards=500), 100, 8)
