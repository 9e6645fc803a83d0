from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        assert plan_index(num_vectors, dim, kind=better).memory_gb > limit  # type: ignore[arg-type]


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


def test_kinds_that_a_gpu_cannot_search_are_refused_and_nprobe_is_lowered() -> None:
    for kind in ("ivf_rabitq", "hnsw"):
        with pytest.raises(
            ValueError,
            match=rf"no GPU form of {kind}; set mining.index_kind to auto, flat, sqfp16, ",
        ):
            plan_index(10**6, 64, kind=kind, gpu=True)
    assert plan_index(10**8, 64, kind="ivf_sq8", nprobe=3000, gpu=True).nprobe == 2048
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
    assert plan.shard_gb == pytest.approx(plan.memory_gb)
    four = replace(plan, num_shards=4)
    assert 4 * four.shard_gb == pytest.approx(plan.memory_gb + 3 * plan.shared_gb)
    assert plan.shared_gb == pytest.approx(2048 * (256 * 4 + 64) / 1e9)
    assert 3 * four.shard_gb < four.peak_gb < 3 * four.shard_gb + 1


def test_lists_grow_with_the_root_of_the_collection() -> None:
    assert [lists_for(n) for n in (1, 38, 100, 10**6, 10**8)] == [1, 1, 2, 2048, 16384]


def test_a_configured_search_effort_is_at_most_the_number_of_lists() -> None:
    assert plan_index(10**6, 64, kind="ivf_sq8", nprobe=7).nprobe == 7
    assert (
        plan_index(1000, 64, kind="ivf_sq8", nprobe=7000).nprobe
        == plan_index(1000, 64, kind="ivf_sq8").num_lists
    )
    assert plan_index(1000, 64, kind="hnsw", ef_search=11).ef_search == 11
