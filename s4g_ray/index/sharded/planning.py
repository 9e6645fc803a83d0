"""Plan an index from what is free on the nodes of the cluster, before its shards start."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import ray
from ray._private.state import available_resources_per_node

from s4g_ray.config.schema import MiningConfig, RayConfig
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.placement import (
    NODE_ID,
    Node,
    NoRoomError,
    check_room,
    nodes_of,
    shard_need,
)
from s4g_ray.errors import RunError
from s4g_ray.index.plan import IndexPlan, Resources, plan_for
from s4g_ray.index.recall import matches_config
from s4g_ray.index.sharded.versions import version_folder
from s4g_ray.progress import Reporter
from s4g_ray.storage.manifest import latest_version, open_published

ACCELERATOR = "ray.io/accelerator-type"  # a label that Ray gives nodes with GPUs
SETTLE_S = 10.0  # for what was freed to be seen as free
AGAIN_S = 0.5  # between two answers that are to agree
# GB of a GPU by Ray's name of its type; the smaller where a type comes with two sizes
GPU_MEMORY_GB = {
    "V100": 16,
    "T4": 16,
    "L4": 24,
    "L40S": 48,
    "A10G": 24,
    "A100": 40,
    "A100-40G": 40,
    "A100-80G": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
    "B300": 288,
}


def plan_shards(
    cfg: MiningConfig,
    folder: str,
    num_vectors: int | None,
    dim: int | None,
    num_queries: int | None,
    num_indexes: int = 1,
    *,
    swaps: bool = True,
) -> IndexPlan | None:
    """Plan the next version of a folder's index from the resources that Ray has free.

    Keeps kind, bits and number of shards of the newest published version where the configuration
    still asks for them and they still fit: a resumed run answers as before. num_vectors and dim
    None: those of that version. Returns None where neither is known. Raises RunError when nothing
    fits.

    num_indexes: that start one after the other, this one first; it gets its part of what is free.
    A plan that is kept may take more: it left room for the others when it was made. swaps: see
    IndexPlan.
    """
    known = read_newest_plan(cfg, folder)
    if known is not None and known.swaps != swaps:
        known = dataclasses.replace(known, swaps=swaps)
    if num_vectors is None or dim is None:
        return known
    deadline = time.monotonic() + SETTLE_S
    if known is not None:
        as_before = partial(plan_as, known, cfg, num_vectors, dim, num_queries=num_queries)
        with suppress(ValueError):  # it does not fit any more
            plan = _plan_for_free(cfg, as_before, deadline)
            return dataclasses.replace(plan, reason=f"{plan.reason}; kind and shards as before")

    def plan_anew(resources: Resources) -> IndexPlan:
        room = divide_room(resources, num_indexes)
        return plan_for(cfg, num_vectors, dim, room, num_queries=num_queries, swaps=swaps)

    try:
        return _plan_for_free(cfg, plan_anew, deadline)
    except ValueError as error:
        raise RunError(str(error)) from error


def _plan_for_free(
    cfg: MiningConfig, plan: Callable[[Resources], IndexPlan], deadline: float
) -> IndexPlan:
    """Plan from what is free, and again until the deadline while nothing fits.

    The memory of shards that were stopped just now is free only when their processes have ended.
    Raises ValueError where nothing fits then, and RunError where no node may hold a shard.
    """
    while True:
        resources = ask_resources(cfg)
        is_late = time.monotonic() >= deadline
        if resources.memory_gb:
            try:
                return plan(resources)
            except ValueError:
                if is_late:
                    raise
        elif is_late:
            need = shard_need(cfg, 1)
            raise RunError(
                f"no node can hold an index shard of {need.of_each} {need.selection}".rstrip()
                + "; change mining.label_selector or mining.gpus_per_shard, or add nodes"
            )
        time.sleep(1.0)


def plan_as(
    known: IndexPlan,
    cfg: MiningConfig,
    num_vectors: int,
    dim: int,
    resources: Resources | None = None,
    *,
    num_queries: int | None = None,
) -> IndexPlan:
    """Plan as plan_for does, with kind, bits, number of shards and `swaps` of a known plan."""
    keys = {"index_kind": known.kind, "num_shards": known.num_shards}
    return plan_for(
        cfg.model_copy(update=keys),
        num_vectors,
        dim,
        resources,
        num_queries=num_queries,
        bits=known.bits,
        swaps=known.swaps,
    )


def read_newest_plan(cfg: MiningConfig, folder: str) -> IndexPlan | None:
    """Return the plan of the newest published version, if the configuration still allows it."""
    version = latest_version(folder, "v")
    if version is None:
        return None
    info = open_published(version_folder(folder, version), "index").info
    if "num_shards" not in info or not matches_config(info, cfg):
        return None
    return IndexPlan(**info["plan"])


def await_nodes(
    cfg: MiningConfig,
    folder: str,
    ray_config: RayConfig,
    reporter: Reporter,
    *,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Ask an autoscaler for the nodes of a folder's index, where they are gone, and wait for them.

    Shards are as many and as large as those of the newest version, or one where there is none.
    After ray.nodes_timeout_s shards are planned for what is there. Calls `tick` while it waits,
    which may raise.
    """
    if not ray_config.nodes_timeout_s:
        return
    known = read_newest_plan(cfg, folder)
    need = shard_need(cfg, cfg.least_shards)
    if known is not None:
        need = shard_need(cfg, known.num_shards, known.peak_gb)
    fits = partial(check_room, [need], [[]])
    nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
    with suppress(NoRoomError):  # plan_shards says what is missing, or takes fewer shards
        await_room(ray_config, fits, nodes, reporter, tick=tick)


def ask_resources(cfg: MiningConfig) -> Resources:
    """Ask Ray for the memory and GPUs that are free, and the cores, where shards may run.

    Ray learns a moment later what was freed (0.1 s), and what a node that has joined has free: asks
    until two answers agree and hold all nodes, for up to SETTLE_S.
    """
    deadline = time.monotonic() + SETTLE_S
    before = None
    while True:
        nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        free = available_resources_per_node()  # type: ignore[no-untyped-call]
        found = find_resources(cfg, nodes, free)
        now = (found.memory_gb, found.gpus)  # tasks take and free CPUs all the time
        is_complete = all(node.labels.get(NODE_ID) in free for node in nodes)
        if (is_complete and now == before) or time.monotonic() >= deadline:
            return found
        before = now
        time.sleep(AGAIN_S)


def find_resources(
    cfg: MiningConfig,
    nodes: Sequence[Node],
    free: Mapping[str, Mapping[str, float]] | None = None,
) -> Resources:
    """Return the room for shards on nodes (their totals), of which `free` is left.

    free: by node id, Ray's resources; a node that is missing has none. None: nothing runs yet.
    Cores are counted whole: shards wait while others compute.
    """
    need = shard_need(cfg, 1)
    usable = [node for node in nodes if need.fits(node) and node.gpus >= min(need.gpus, 1)]
    usable = [node for node in usable if node.cpus] or usable  # a head without CPUs holds none
    left = [_find_free(node, free) for node in usable]
    sizes = [GPU_MEMORY_GB.get(node.labels.get(ACCELERATOR, "")) for node in usable]
    known = [size for size in sizes if size is not None]
    return Resources(
        memory_gb=tuple(node.memory_gb or 0.0 for node in left),
        cores=tuple(node.cpus for node in usable),
        gpus=tuple(node.gpus for node in left) if cfg.gpus_per_shard else (),
        gpu_memory_gb=min(known) if len(known) == len(sizes) and known else None,
        free_cpus=tuple(node.cpus for node in left),
    )


def divide_room(room: Resources, num_indexes: int) -> Resources:
    """Return the room of one of several indexes; they take turns on the cores."""
    return Resources(
        memory_gb=tuple(gb / num_indexes for gb in room.memory_gb),
        cores=room.cores,
        gpus=tuple(gpus / num_indexes for gpus in room.gpus),
        gpu_memory_gb=room.gpu_memory_gb,
        free_cpus=tuple(cpus / num_indexes for cpus in room.free_cpus),
    )


def _find_free(node: Node, free: Mapping[str, Mapping[str, float]] | None) -> Node:
    """Return a node with what is free of its resources."""
    if free is None:
        return node
    own = free.get(node.labels.get(NODE_ID, ""), {})
    memory_gb = own.get("memory", 0.0) / 1e9
    return Node(own.get("CPU", 0.0), own.get("GPU", 0.0), node.labels, memory_gb)
