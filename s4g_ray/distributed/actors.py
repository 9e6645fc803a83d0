"""Wait for actors to start, within a time.

The error of actors that do not start tells those that find no room, with their demand and what the
cluster has free, from those that start slowly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RayError

from s4g_ray.amounts import count_noun
from s4g_ray.distributed.placement import UNIT, Need, describe_labels, nodes_of
from s4g_ray.errors import RunError, reason_of


def await_start(actors: Sequence[Any], need: Need, timeout_s: float) -> None:
    """Wait until all actors answer.

    Kills all of them and raises RunError when one does not answer within timeout_s, or fails.
    """
    calls = [actor.__ray_ready__.remote() for actor in actors]
    _, late = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
    fault = describe_late(len(late), need, timeout_s) if late else ""
    try:
        ray.get([call for call in calls if call not in late])
    except RayError as error:
        fault = f"{count_noun(need.count, need.name)} cannot start: {reason_of(error)}"
    if fault:
        kill(actors)
        raise RunError(fault)


def await_some(
    actors: Sequence[Any], need: Need, timeout_s: float, patience_s: float
) -> tuple[Any, ...]:
    """Wait until all actors answer, or some and the others do not within patience_s more.

    Returns those that answer, and kills the others. Kills all of them and raises RunError when none
    answers within timeout_s, or one fails.
    """
    calls = [actor.__ray_ready__.remote() for actor in actors]
    ready, late = ray.wait(calls, num_returns=1, timeout=timeout_s)
    if ready and late:
        ready, late = ray.wait(calls, num_returns=len(calls), timeout=patience_s)
    fault = "" if ready else describe_late(len(late), need, timeout_s)
    try:
        ray.get(ready)
    except RayError as error:
        fault = f"{count_noun(need.count, need.name)} cannot start: {reason_of(error)}"
    if fault:
        kill(actors)
        raise RunError(fault)
    kill([actor for actor, call in zip(actors, calls, strict=True) if call in late])
    return tuple(actor for actor, call in zip(actors, calls, strict=True) if call in ready)


def describe_late(num_late: int, need: Need, timeout_s: float) -> str:
    """Return the error message of actors that did not answer in time.

    They wait for room or a matching node, or they have a place and are still starting.
    """
    num_waiting = min(num_late, count_waiting(need))
    if not num_waiting:
        return (
            f"{num_late} of {count_noun(need.count, need.name)} did not start within"
            f" {timeout_s:g} s: they have found room, and their processes are still starting, as"
            " on a busy machine; raise ray.start_timeout_s, or end other work there"
        )
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    demand = need.of_each
    labels = ""
    if need.selector:
        demand += f" and a node of {need.selection}"
        nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        labels = f"; the labels of its nodes are {describe_labels(nodes)}"
    cpus = count_noun(free.get("CPU", 0.0), "CPU")
    there = f"{cpus} and {count_noun(free.get('GPU', 0.0), 'GPU')}"
    if need.memory_gb:
        there += f" and {free.get('memory', 0.0) / 1e9:.3g} GB of memory"
    return (
        f"{num_waiting} of {count_noun(need.count, need.name)} did not start within"
        f" {timeout_s:g} s: each asks for {demand}; the cluster has {there} free{labels}; ask for"
        " less, free resources, or raise ray.start_timeout_s"
    )


def count_waiting(need: Need) -> int:
    """Return how many actors and tasks of these resources wait for room, as Ray reports demand.

    Ray's table of actors does not tell: an actor is PENDING_CREATION until its class is loaded.
    """
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    bundles = [
        one
        for demand in status.resource_demands.ray_task_actor_demand
        for one in demand.bundles_by_count
    ]
    return sum(one.count for one in bundles if _asks_for(one.bundle, need))


def _asks_for(bundle: Mapping[str, float], need: Need) -> bool:
    wanted = {"CPU": need.cpus, "GPU": need.gpus, "memory": 1e9 * need.memory_gb}
    return all(
        math.isclose(bundle.get(kind, 0.0), amount, rel_tol=1e-3, abs_tol=1 / UNIT)
        for kind, amount in wanted.items()
    )


def kill(actors: Sequence[Any]) -> None:
    """Stop actors, without restarts."""
    for actor in actors:
        ray.kill(actor)
