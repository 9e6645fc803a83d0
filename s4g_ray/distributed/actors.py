"""Actors that start within a time, or an error that says what they ask for and what the cluster has left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from s4g_ray.distributed.placement import Need, count_noun, describe_labels, nodes_of
from s4g_ray.errors import RunError, reason_of


def await_start(actors: Sequence[Any], need: Need, timeout_s: float) -> None:
    """Wait until all of them answer. Raises RunError, with none of them left, when some do not within timeout_s."""
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


def describe_late(num_late: int, need: Need, timeout_s: float) -> str:
    """What is said of actors that wait for room, or for their node, for too long."""
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    labels = ""
    if need.selector:
        nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        labels = f"; the labels of its nodes are {describe_labels(nodes)}"
    return (
        f"{num_late} of {count_noun(need.count, need.name)} did not start within {timeout_s:g} s: each asks for"
        f" {need.of_each}{' and a node of ' + need.selection if need.selector else ''}; free in the cluster are"
        f" {free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs{labels}; ask for less, free what is asked"
        " for, or raise ray.start_timeout_s"
    )


def kill(actors: Sequence[Any]) -> None:
    """Stop actors for good."""
    for actor in actors:
        ray.kill(actor)
