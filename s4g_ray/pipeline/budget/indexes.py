"""Plan the indexes of a run, as its mining rounds will build them, and what they cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from s4g_ray.config.schema import RunConfig
from s4g_ray.distributed.placement import Node
from s4g_ray.errors import InputError
from s4g_ray.index.cost import Cost, Rates, expected_cost
from s4g_ray.index.plan import IndexPlan, Resources, plan_for, plan_index
from s4g_ray.index.rates import measure_rates, rates_for
from s4g_ray.index.sharded.planning import divide_room, find_resources
from s4g_ray.mining.cells.geographic_cells import NUM_ADJOINING
from s4g_ray.pipeline.budget.sizes import RunSizes

RAY_MEMORY = 0.7  # of a machine: what Ray gives to actors, beside its object store


@dataclass(frozen=True)
class PlannedIndex:
    """The plan of one collection's index, the queries of a round, and rates measured here."""

    plan: IndexPlan
    num_queries: int
    rates: Rates


def plan_indexes(
    config: RunConfig, sizes: RunSizes, nodes: Sequence[Node]
) -> dict[str, PlannedIndex]:
    """Plan the index of each collection on the nodes; none where the run builds none.

    Measures for some seconds how fast this machine searches. Raises InputError for an index that
    cannot be built as configured.
    """
    mining = config.mining
    counts = _count_references(config, sizes)
    if not counts:
        return {}
    resources = _room_of(config, nodes, len(counts))
    found = {}
    for name, count in counts.items():
        try:
            plan = plan_for(mining, count, sizes.dim, resources, num_queries=sizes.queries)
        except ValueError as error:
            raise InputError(str(error)) from error
        found[name] = PlannedIndex(plan, sizes.queries, rates_for(plan, mining))
    return found


def largest_indexes(config: RunConfig, sizes: RunSizes) -> list[float]:
    """Return the bytes of each index at most: those of `flat` where the kind is chosen later."""
    mining = config.mining
    kind = "flat" if mining.index_kind == "auto" else mining.index_kind
    largest = []
    for count in _count_references(config, sizes).values():
        memory_gb = plan_index(count, sizes.dim, kind=kind).memory_gb
        largest.append(1e9 * min(memory_gb, mining.index_memory_gb or memory_gb))
    return largest


def _count_references(config: RunConfig, sizes: RunSizes) -> dict[str, int]:
    """Count the references of each index; none where rounds build none."""
    if config.sampling.mode != "similarity" or config.mining.scope == "cells":
        return {}
    counts = {"pairs": sizes.references}
    if sizes.gallery_references:
        counts["gallery"] = sizes.gallery_references
    return counts


def _room_of(config: RunConfig, nodes: Sequence[Node], num_indexes: int) -> Resources:
    """Return the room of one of the indexes on nodes where nothing else runs."""
    own_gb = RAY_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    known = [
        node if node.memory_gb is not None else replace(node, memory_gb=own_gb) for node in nodes
    ]
    return divide_room(find_resources(config.mining, known), num_indexes)


def estimate_costs(
    config: RunConfig, sizes: RunSizes, indexes: dict[str, PlannedIndex]
) -> dict[str, Cost]:
    """Estimate what a full round's indexes cost, from rates measured here: seconds for each.

    Mining within cells is a search without an index, `cells`.
    """
    costs = {
        name: expected_cost(index.plan, index.rates, num_queries=index.num_queries)
        for name, index in indexes.items()
    }
    if config.sampling.mode == "similarity" and config.mining.scope == "cells":
        costs["cells"] = _estimate_cells(config, sizes)
    return costs


def _estimate_cells(config: RunConfig, sizes: RunSizes) -> Cost:
    """Estimate exact searches among a query's cell, those that adjoin it, and far references."""
    mining = config.mining
    num_references = sizes.references + sizes.gallery_references
    per_cell = mining.cell_places * max(1.0, num_references / max(sizes.places, 1))
    candidates = round((1 + NUM_ADJOINING) * per_cell) + mining.far_references
    plan = plan_index(max(1, min(candidates, num_references)), sizes.dim, kind="flat")
    rates = measure_rates(plan, mining.index_threads)
    cost = expected_cost(plan, rates, num_queries=-(-sizes.queries // mining.num_searchers))
    return replace(cost, train_s=0.0, build_s=0.0)
