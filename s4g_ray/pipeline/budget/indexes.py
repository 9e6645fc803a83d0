"""Plan the indexes of a run, as its mining rounds will build them, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import InputError
from s4g_ray.index.cost import Cost, expected_cost, measure_rates
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.recall import plan_for
from s4g_ray.pipeline.budget.sizes import RunSizes


@dataclass(frozen=True)
class PlannedIndex:
    """The plan of one collection's index, its shards, and the queries of a round."""

    plan: IndexPlan
    num_shards: int
    num_queries: int


def plan_indexes(config: RunConfig, sizes: RunSizes) -> dict[str, PlannedIndex]:
    """Plan the index of each collection; none where the run mines nothing.

    Raises InputError for an index that cannot be built as configured.
    """
    if config.sampling.mode != "similarity":
        return {}
    counts = {"pairs": sizes.references}
    if sizes.gallery_references:
        counts["gallery"] = sizes.gallery_references
    found = {}
    for name, count in counts.items():
        try:
            plan = plan_for(config.mining, count, sizes.dim)
        except ValueError as error:
            raise InputError(str(error)) from error
        found[name] = PlannedIndex(plan, config.mining.num_shards, sizes.queries)
    return found


def measure_costs(config: RunConfig, indexes: dict[str, PlannedIndex]) -> dict[str, Cost]:
    """Estimate what a full round's indexes cost, from rates measured here: seconds for each."""
    costs = {}
    for name, index in indexes.items():
        rates = measure_rates(index.plan, config.mining.index_threads)
        costs[name] = expected_cost(
            index.plan, rates, num_queries=index.num_queries, num_shards=index.num_shards
        )
    return costs
