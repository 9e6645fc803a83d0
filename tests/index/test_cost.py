"""Expected times, and the rates that they are counted with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from s4g_ray.index.cost import Rates, expected_cost, recorded_rates
from s4g_ray.index.plan import EXACT_KINDS, IVF_KINDS, Kind, plan_index
from tests.support.search_oracle import KINDS


def test_costs_are_counted_work_times_rates() -> None:
    rates = Rates(2, product=1e-11, row=1e-6, code=1e-8, walk=1e-3)
    two = replace(plan_index(10**6, 100, kind="flat"), num_shards=2)
    flat = expected_cost(two, rates, num_queries=500)
    assert flat.train_s == 0
    assert flat.build_s == pytest.approx(0.5)
    assert flat.search_s == pytest.approx(500 * 2 * 500_000 * 100 * 1e-11)
    plan = plan_index(10**6, 100, kind="ivf_sq8", nprobe=32)
    ivf = expected_cost(plan, rates, num_queries=500)
    assign = 2 * 2048 * 100 * 1e-11
    assert ivf.train_s == pytest.approx(10 * 131_072 * assign)
    assert ivf.build_s == pytest.approx(ivf.train_s + 10**6 * (assign + 1e-6))
    assert ivf.search_s == pytest.approx(500 * (assign + 10**6 * 32 / 2048 * 1e-8))
    assert ivf.queries_per_s == pytest.approx(500 / ivf.search_s)
    graph = [
        expected_cost(plan_index(n, 100, kind="hnsw"), rates, num_queries=1) for n in (2**12, 2**24)
    ]
    assert graph[1].search_s == pytest.approx(2 * graph[0].search_s)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_rates_have_the_work_of_each_kind_and_grow_with_threads(kind: Kind) -> None:
    two = recorded_rates(kind, 256, 2)
    assert (two.product > 0) == (kind in (*EXACT_KINDS, *IVF_KINDS))
    assert (two.code > 0) == (kind in IVF_KINDS)
    assert (two.walk > 0) == (kind == "hnsw")
    plan = plan_index(10**6, 256, kind=kind)
    hours = [
        expected_cost(plan, recorded_rates(kind, 256, threads), num_queries=10**6).search_s
        for threads in (1, 2, 8)
    ]
    assert hours[0] == pytest.approx(2 * hours[1]) == pytest.approx(8 * hours[2])
    if kind in ("flat", "sqfp16", "ivf_sq8"):
        gpu = recorded_rates(kind, 256, 2, gpu=True)
        assert expected_cost(plan, gpu, num_queries=10**6).search_s < hours[1] / 20
