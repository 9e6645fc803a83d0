"""Rates that are measured."""

from __future__ import annotations

import pytest

from s4g_ray.index.cost import expected_cost
from s4g_ray.index.plan import Kind, plan_index
from s4g_ray.index.rates import measure_rates


@pytest.mark.parametrize("kind", ["flat", "ivf_sq8", "ivf_rabitq", "hnsw"])
def test_rates_are_measured_for_the_work_of_each_kind(kind: Kind) -> None:
    plan = plan_index(100_000, 16, kind=kind)
    rates = measure_rates(plan, 2)
    cost = expected_cost(plan, rates, num_queries=10)
    assert rates.num_threads == 2
    assert 0 < cost.search_s < 10
    assert 0 <= cost.train_s <= cost.build_s < 1000
    assert (rates.engine != "") == plan.is_exact
