"""Plan cells as Ray tasks, for more pairs than one process should hold a graph for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from s4g_ray.arrays import Rows32
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.places import Places
from s4g_ray.data.schema import ProtocolName
from s4g_ray.data.tables.batch_plan import BatchPlan
from s4g_ray.data.tables.neighbor_graph import NeighborGraph, read_graph_part
from s4g_ray.errors import RunError, first_line
from s4g_ray.sampling.cells import PLANNER_CPUS, Cell, CellTree, PlanOptions, plan_tree
from s4g_ray.sampling.compact_graph import IdLookup, fill_rows
from s4g_ray.sampling.exclusion_table import ExclusionTable
from s4g_ray.sampling.sampler import check_sizes, rows_of_pairs
from s4g_ray.storage.manifest import Part, open_published


def plan_cells_on_cluster(
    pairs: PairTable,
    graph_uri: str | None,
    places: Places,
    *,
    batch_size: int,
    num_hard_negatives: int = 64,
    neighbor_pool_size: int = 128,
    seed: int,
    epoch: int,
    protocol: ProtocolName = "strict",
    exclusions: NeighborGraph | Exclusions | None = None,
    max_pairs_per_cell: int,
    cpus_per_task: float = PLANNER_CPUS,
) -> BatchPlan:
    """Make the plan of cells.plan_cells from a published graph, on the connected Ray cluster.

    One task for each part of the graph splits its rows by cell, one task for each cell plans it.
    This process holds only the flat arrays of pairs and places and the finished plan; the graph is
    in the object store, over all nodes, 4 bytes a neighbor. Raises ValueError as plan_cells does,
    and RunError when the graph is unpublished or altered.
    """
    check_sizes(batch_size, num_hard_negatives, neighbor_pool_size)
    options = PlanOptions(batch_size, num_hard_negatives, neighbor_pool_size, seed, epoch)
    lookup = IdLookup.from_ids(places.ids)
    place_of_pair = rows_of_pairs(pairs, lookup)
    tree = CellTree.divide(places, place_of_pair, max_pairs_per_cell, options)
    remote = _make_remote(cpus_per_task)
    fragments = _split_graph(graph_uri, neighbor_pool_size, ray.put(lookup), tree, remote)
    cells = ([cell, *rows] for cell, rows in zip(tree.cells(place_of_pair), fragments, strict=True))
    return plan_tree(
        tree,
        cells,
        ray.put(ExclusionTable.from_exclusions(exclusions, lookup)),
        options,
        protocol,
        call=lambda function, *arguments: remote(function, 2, *arguments),
        get=get_cancelling,
    )


def _make_remote(num_cpus: float) -> Callable[..., Any]:
    """Return remote(function, num_returns, *arguments), which starts a task.

    It returns the references of the task's results.
    """

    def call(function: Callable[..., Any], num_returns: int, *arguments: Any) -> Any:
        options = {
            "num_cpus": num_cpus,
            "num_returns": num_returns,
            "scheduling_strategy": "SPREAD",
        }
        references = _make_task(function).options(**options).remote(*arguments)
        return [references] if num_returns == 1 else references

    return call


@functools.cache
def _make_task(function: Callable[..., Any]) -> Any:
    """Return the Ray form of a function, made once: each one is shipped to all workers."""
    return ray.remote(function)


def get_cancelling(references: Sequence[Any]) -> Sequence[Any]:
    """Return the results of tasks.

    Raises an error of a task as the task raised it, and RunError for a task that died.
    """
    try:
        return list(ray.get(list(references)))
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        remedy = "resume, with a lower sampling.max_pairs_per_cell if memory ran out"
        raise RunError(f"planning a cell failed: {first_line(error)}; {remedy}") from error


def _split_graph(
    uri: str | None, width: int, lookup: Any, tree: CellTree, remote: Callable[..., Any]
) -> Iterator[list[Any]]:
    """Split each part of the graph by cell; yield for each cell the references of its fragments."""
    if uri is None:
        return iter([[] for _ in tree.leaves])
    manifest = open_published(uri, "neighbors")
    num_cells = len(tree.leaves)
    width = min(width, int(manifest.info["k"]))
    leaf_of_place = ray.put(tree.leaf_of_place)
    by_part = [
        remote(split_graph_part, num_cells, uri, part, width, lookup, leaf_of_place, num_cells)
        for part in manifest.parts
    ]
    return (list(fragments) for fragments in zip(*by_part, strict=True))


def split_graph_part(
    uri: str, part: Part, width: int, lookup: IdLookup, leaf_of_place: Rows32, num_cells: int
) -> list[Cell] | Cell:
    """Split the rows of one part of a graph by cell, without pairs.

    Neighbors that are not among the places are dropped. Returns a Cell instead of a list when there
    is one cell, as Ray expects of a task with one result.
    """
    graph = read_graph_part(uri, part)
    at = lookup.rows(graph.places)
    own = np.unique(at[at >= 0])
    rows = np.full((len(own), width), -1, dtype=np.int32)
    targets = IdLookup.from_ids(own.astype(np.int64)).rows(at.astype(np.int64))
    fill_rows(rows, lookup, graph, targets, num_threads=1)
    leaves = leaf_of_place[own]
    cells: list[Cell] = []
    for cell in range(num_cells):
        chosen = np.flatnonzero(leaves == cell)
        cells.append(Cell.from_graph(own[chosen], rows[chosen]))
    return cells if num_cells > 1 else cells[0]
