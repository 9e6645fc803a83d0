"""Estimate the memory of each process of a run. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from s4g_ray.amounts import format_bytes
from s4g_ray.config.schema import RunConfig
from s4g_ray.index.plan import IndexPlan
from s4g_ray.pipeline.budget.sizes import RunSizes

# resident after the imports of each process, measured with CPU builds of torch and faiss
DRIVER_GB = 1.0
WORKER_GB = 0.9
ACTOR_GB = 0.9
SEARCHER_GB = 0.3
# a place of one query and one reference, held through the run (measured 64.5 at 3e6 places)
DRIVER_BYTES = 64
# a pair, while a plan is made in one pass; and while places are divided into cells or shares, at
# most (benchmarks.replay)
ONE_PASS_BYTES = 48
CELLS_BYTES = 64
RANK_BYTES = 32  # a place; the ranks of a node share them
SHARED_BYTES = 40  # a query and a reference in the tables that mining tasks share
TRAINING_COPIES = 4  # of the weights: themselves, gradients and two moments


@dataclass(frozen=True)
class ProcessMemory:
    """The memory of each of `count` processes of one kind; note: what it is made of, or lacks."""

    name: str
    count: int
    gb: float
    note: str


def list_memory(
    config: RunConfig, sizes: RunSizes, indexes: Mapping[str, IndexPlan]
) -> list[ProcessMemory]:
    """Estimate the memory of the processes of a run. indexes: the plan of each."""
    sampling = config.sampling
    weights_gb = 4 * sizes.parameters / 1e9
    planned_gb = 0.0
    one_pass = sizes.pairs <= sampling.max_pairs_per_cell
    if sampling.mode != "random":
        graphed = sizes.places if one_pass else min(sizes.places, sampling.max_pairs_per_cell)
        planned_gb = 4 * sampling.neighbor_pool_size * graphed / 1e9
    driver_gb = DRIVER_GB + DRIVER_BYTES * (sizes.places + sizes.gallery_places) / 1e9
    driver_gb += (ONE_PASS_BYTES if one_pass else CELLS_BYTES) * sizes.pairs / 1e9
    rank_gb = WORKER_GB + TRAINING_COPIES * weights_gb
    place_gb = RANK_BYTES * (sizes.places + sizes.gallery_places) / 1e9
    found = [
        ProcessMemory(
            "driver",
            1,
            driver_gb + (planned_gb if one_pass else 0.0),
            "the graph that plans are made from included" if one_pass else "while it plans",
        ),
        ProcessMemory(
            "training worker",
            config.train.workers[1],
            rank_gb,
            "weights, gradients and optimiser; activations add to it, and"
            f" {format_bytes(1e9 * place_gb)} a node for the data set",
        ),
        ProcessMemory(
            "embedding actor",
            config.embedding.actors[1],
            ACTOR_GB + weights_gb,
            f"activations of {config.embedding.batch_size} images add to it",
        ),
    ]
    if not one_pass and planned_gb:
        found.append(ProcessMemory("planning task", 1, planned_gb, "at a time on a node"))
    for name, plan in indexes.items():
        note = f"{plan.kind}; the version in service, the new one and its file while they swap"
        found.append(ProcessMemory(f"index shard ({name})", plan.num_shards, plan.peak_gb, note))
    if sampling.mode == "similarity":
        note = "and the embeddings of its group of queries"
        found.append(
            ProcessMemory("searching task", config.mining.num_searchers, SEARCHER_GB, note)
        )
    shared_gb = SHARED_BYTES * (sizes.queries + sizes.gallery_references) / 1e9
    found.append(
        ProcessMemory("object store", 1, shared_gb, "a node, in mining; batches of images besides")
    )
    return found
