from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4g_ray.index.cost import Rates, expected_cost, measure_rates
from s4g_ray.index.faiss_library import faiss
from s4g_ray.index.plan import CHOICES, IndexPlan, Kind, code_bytes, lists_for, plan_index

ORDER = ("flat", "sqfp16", "ivf_sq8", "ivf_rabitq")


@pytest.mark.parametrize(
    ("memory_gb", "kind", "bits"),
    [
        (None, "flat", 0),
        (4.2, "flat", 0),
        (2.1, "sqfp16", 0),
        (1.7, "ivf_sq8", 0),
        (0.9, "ivf_rabitq", 4),
        (0.3, "ivf_rabitq", 1),
    ],
)
def test_auto_takes_the_most_exact_kind_that_fits(
    memory_gb: float | None, kind: str, bits: int
) -> None:
    plan = plan_index(10**6, 1024, memory_gb=memory_gb)
    assert (plan.kind, plan.bits) == (kind, bits)


def test_auto_does_not_search_exactly_where_a_search_takes_longer_than_embedding() -> None:
    assert plan_index(90_000_000, 1024).kind == "flat"
    assert plan_index(200_000_000, 1024).kind == "ivf_sq8"
    assert plan_index(200_000_000, 1024, kind="flat").kind == "flat"


@given(
    num_vectors=st.integers(1, 10**9),
    dim=st.integers(1, 2048),
    kind=st.sampled_from(["auto", *CHOICES]),
    memory_gb=st.none() | st.floats(1e-6, 1e4),
)
def test_a_plan_fits_its_budget_and_nothing_more_exact_does(
    num_vectors: int, dim: int, kind: Kind, memory_gb: float | None
) -> None:
    limit = math.inf if memory_gb is None else memory_gb
    names = ORDER if kind == "auto" else (kind,)
    least = min(plan_index(num_vectors, dim, kind=name).memory_gb for name in names)  # type: ignore[arg-type]
    try:
        plan = plan_index(num_vectors, dim, kind=kind, memory_gb=memory_gb)
    except ValueError:
        plan = None
    # least is the size of ivf_rabitq with 4 bits: 1 bit may fit below it
    if plan is None or least > limit:
        assert least > limit
        assert plan is None or (plan.bits == 1 and plan.memory_gb <= limit)
        return
    check_plan(plan, limit)
    for better in ORDER[: ORDER.index(plan.kind)] if kind == "auto" else ():
        too_long = better in ("flat", "sqfp16") and num_vectors * dim > 1e11
        assert too_long or plan_index(num_vectors, dim, kind=better).memory_gb > limit  # type: ignore[arg-type]


def check_plan(plan: IndexPlan, limit: float) -> None:
    assert plan.shared_gb <= plan.memory_gb <= limit
    assert plan.nprobe <= plan.num_lists <= max(1, plan.num_vectors // 39)
    assert plan.num_lists <= plan.train_size <= plan.num_vectors or not plan.num_lists
    assert IndexPlan(**json.loads(json.dumps(asdict(plan)))) == plan


@given(num_vectors=st.integers(1, 10**9), memory_gb=st.none() | st.floats(1e-3, 1e4))
def test_auto_on_a_gpu_takes_the_most_exact_kind_that_it_can_search(
    num_vectors: int, memory_gb: float | None
) -> None:
    try:
        plan = plan_index(num_vectors, 64, memory_gb=memory_gb)
        found = plan_index(num_vectors, 64, memory_gb=memory_gb, gpu=True)
    except ValueError:
        assert memory_gb is not None
        assert plan_index(num_vectors, 64, kind="ivf_sq8").memory_gb > memory_gb
        return
    assert found == plan
    assert found.kind in ("flat", "sqfp16", "ivf_sq8")


def test_plans_that_a_gpu_cannot_search_are_refused_with_the_remedy() -> None:
    for kind in ("ivf_rabitq", "hnsw"):
        with pytest.raises(
            ValueError,
            match=rf"no GPU form of {kind}; set mining.index_kind to auto, flat, sqfp16, ",
        ):
            plan_index(10**6, 64, kind=kind, gpu=True)
    with pytest.raises(
        ValueError, match=r"nprobe=3000 exceeds 2048, the most on a GPU; lower mining.nprobe, or"
    ):
        plan_index(10**8, 64, kind="ivf_sq8", nprobe=3000, gpu=True)
    all_lists = plan_index(10**6, 64, kind="ivf_sq8", nprobe=3000, gpu=True)
    assert all_lists.nprobe == 2048
    assert plan_index(10**8, 64, kind="flat", nprobe=3000, gpu=True).is_exact


def test_a_budget_that_fits_nothing_is_refused_with_sizes_and_remedy() -> None:
    message = (
        r"1,000,000 vectors of D=1024 need 0\.\d+ GB as 1-bit ivf_rabitq \(224 bytes each"
        r" and 0\.01 GB of cells\), over memory_gb=0\.1; raise mining\.index_memory_gb, the limit"
        r" over all shards, and mining\.num_shards"
    )
    with pytest.raises(ValueError, match=message):
        plan_index(10**6, 1024, memory_gb=0.1)
    with pytest.raises(
        ValueError, match=r"need 4\.10 GB as flat \(4104 bytes each\), over memory_gb=4"
    ):
        plan_index(10**6, 1024, kind="flat", memory_gb=4)
    with pytest.raises(ValueError, match="both must be at least 1"):
        plan_index(0, 10)
    with pytest.raises(ValueError, match="kind='ivf' is none of auto, flat"):
        plan_index(10, 10, kind="ivf")  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [20, 256, 1023])
@pytest.mark.parametrize(
    ("bits", "code"), [(8, "SQ8"), (1, "RaBitQ"), (2, "RaBitQ2"), (4, "RaBitQ4")]
)
def test_code_sizes_are_those_of_faiss(dim: int, bits: int, code: str) -> None:
    index = faiss.index_factory(dim, f"IVF1,{code}", faiss.METRIC_INNER_PRODUCT)
    assert code_bytes(dim, bits) == index.code_size


def test_a_shard_holds_its_part_and_a_copy_of_the_shared_structures() -> None:
    plan = plan_index(10**6, 256, kind="ivf_sq8")
    assert plan.shard_gb(1) == pytest.approx(plan.memory_gb)
    assert 4 * plan.shard_gb(4) == pytest.approx(plan.memory_gb + 3 * plan.shared_gb)
    assert plan.shared_gb == pytest.approx(2048 * (256 * 4 + 64) / 1e9)


def test_lists_grow_with_the_root_of_the_collection() -> None:
    assert [lists_for(n) for n in (1, 38, 100, 10**6, 10**8)] == [1, 1, 2, 2048, 16384]


def test_a_configured_search_effort_is_at_most_the_number_of_lists() -> None:
    assert plan_index(10**6, 64, kind="ivf_sq8", nprobe=7).nprobe == 7
    assert (
        plan_index(1000, 64, kind="ivf_sq8", nprobe=7000).nprobe
        == plan_index(1000, 64, kind="ivf_sq8").num_lists
    )
    assert plan_index(1000, 64, kind="hnsw", ef_search=11).ef_search == 11


def test_costs_are_counted_work_times_rates() -> None:
    rates = Rates(2, product=1e-11, row=1e-6, code=1e-8, walk=1e-3)
    flat = expected_cost(plan_index(10**6, 100, kind="flat"), rates, num_queries=500, num_shards=2)
    assert flat.train_s == 0
    assert flat.build_s == pytest.approx(0.5)
    assert flat.search_s == pytest.approx(500 * 2 * 500_000 * 100 * 1e-11)
    plan = plan_index(10**6, 100, kind="ivf_sq8", nprobe=32)
    ivf = expected_cost(plan, rates, num_queries=500, num_shards=1)
    assign = 2 * 2048 * 100 * 1e-11
    assert ivf.train_s == pytest.approx(10 * 131_072 * assign)
    assert ivf.build_s == pytest.approx(ivf.train_s + 10**6 * (assign + 1e-6))
    assert ivf.search_s == pytest.approx(500 * (assign + 10**6 * 32 / 2048 * 1e-8))
    assert ivf.queries_per_s == pytest.approx(500 / ivf.search_s)
    graph = [
        expected_cost(plan_index(n, 100, kind="hnsw"), rates, num_queries=1, num_shards=1)
        for n in (2**12, 2**24)
    ]
    assert graph[1].search_s == pytest.approx(2 * graph[0].search_s)


@pytest.mark.parametrize("kind", ["flat", "ivf_sq8", "ivf_rabitq", "hnsw"])
def test_rates_are_measured_for_the_work_of_each_kind(kind: Kind) -> None:
    plan = plan_index(100_000, 16, kind=kind)
    rates = measure_rates(plan, 2)
    cost = expected_cost(plan, rates, num_queries=10, num_shards=1)
    assert rates.num_threads == 2
    assert 0 < cost.search_s < 10
    assert 0 <= cost.train_s <= cost.build_s < 1000
    assert (rates.engine != "") == plan.is_exact
