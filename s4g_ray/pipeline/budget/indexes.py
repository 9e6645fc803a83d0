"""Plan the indexes of a run, as its mining rounds will build them, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import InputError
from s4g_ray.index.cost import Cost, expected_cost, measure_rates
from s4g_ray.index.plan import IndexPlan, plan_index
from s4g_ray.index.recall import plan_for
from s4g_ray.mining.cells.geographic_cells import NUM_ADJOINING
from s4g_ray.pipeline.budget.sizes import RunSizes


@dataclass(frozen=True)
class PlannedIndex:
    """The plan of one collection's index, its shards, and the queries of a round."""

    plan: IndexPlan
    num_shards: int
    num_queries: int


def plan_indexes(config: RunConfig, sizes: RunSizes) -> dict[str, PlannedIndex]:
    """Plan the index of each collection; none where the run mines nothing, or within cells.

    Raises InputError for an index that cannot be built as configured.
    """
    if config.sampling.mode != "similarity" or config.mining.scope == "cells":
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


def measure_costs(
    config: RunConfig, sizes: RunSizes, indexes: dict[str, PlannedIndex]
) -> dict[str, Cost]:
    """Estimate what a full round's searches cost, from rates measured here: seconds for each."""
    mining = config.mining
    if config.sampling.mode == "similarity" and mining.scope == "cells":
        return {"cells": _measure_cells(config, sizes)}
    costs = {}
    for name, index in indexes.items():
        rates = measure_rates(index.plan, mining.index_threads)
        costs[name] = expected_cost(
            index.plan, rates, num_queries=index.num_queries, num_shards=index.num_shards
        )
    return costs


def _measure_cells(config: RunConfig, sizes: RunSizes) -> Cost:
    """Estimate exact searches among a query's cell, those that adjoin it, and far references."""
    mining = config.mining
    num_references = sizes.references + sizes.gallery_references
    per_cell = mining.cell_places * max(1.0, num_references / max(sizes.places, 1))
    candidates = round((1 + NUM_ADJOINING) * per_cell) + mining.far_references
    plan = plan_index(max(1, min(candidates, num_references)), sizes.dim, kind="flat")
    rates = measure_rates(plan, mining.index_threads)
    queries = -(-sizes.queries // mining.num_searchers)
    cost = expected_cost(plan, rates, num_queries=queries, num_shards=1)
    return replace(cost, train_s=0.0, build_s=0.0)
