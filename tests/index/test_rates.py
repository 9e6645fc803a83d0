"""Rates that are measured, and plans that are made with them."""

from __future__ import annotations

import pytest

from s4g_ray.config.schema import MiningConfig
from s4g_ray.index.cost import Rates, expected_cost
from s4g_ray.index.plan import IndexPlan, Kind, plan_index
from s4g_ray.index.rates import measure_rates, plan_by_rates


@pytest.mark.parametrize("kind", ["flat", "ivf_sq8", "ivf_rabitq", "hnsw"])
def test_rates_are_measured_for_the_work_of_each_kind(kind: Kind) -> None:
    plan = plan_index(100_000, 16, kind=kind)
    rates = measure_rates(plan, 2)
    cost = expected_cost(plan, rates, num_queries=10)
    assert rates.num_threads == 2
    assert 0 < cost.search_s < 10
    assert 0 <= cost.train_s <= cost.build_s < 1000
    assert (rates.engine != "") == plan.is_exact


def test_kinds_are_measured_one_by_one_up_to_the_one_that_is_taken() -> None:
    measured: list[str] = []

    def measure(plan: IndexPlan, num_threads: int) -> Rates:
        measured.append(plan.kind)
        slow = plan.kind == "flat"
        return Rates(num_threads, 1e-8 if slow else 1e-13, row=1e-9, code=1e-12)

    plan, rates = plan_by_rates(MiningConfig(), 10**6, 64, measure=measure)
    assert (plan.kind, measured) == ("ivf_sq8", ["flat", "ivf_sq8"])
    assert rates["sqfp16"] == rates["flat"]  # which differ by the conversion of blocks alone
    measured.clear()
    named, rates = plan_by_rates(MiningConfig(index_kind="ivf_rabitq"), 10**6, 64, measure=measure)
    assert (named.kind, measured, list(rates)) == ("ivf_rabitq", ["ivf_rabitq"], ["ivf_rabitq"])
    measured.clear()
    plan, rates = plan_by_rates(MiningConfig(gpus_per_shard=1), 10**6, 64, measure=measure)
    assert (plan.kind, measured, list(rates)) == ("flat", [], ["flat"])
