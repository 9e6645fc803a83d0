"""Nodes that are still to come: an autoscaler is asked for what a command needs, before the command starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from s4g_ray.config.schema import RayConfig
from s4g_ray.distributed.placement import Need, Node, NoRoomError, nodes_of
from s4g_ray.progress import Reporter

LOOK_EVERY_S = 1.0


def await_room(
    config: RayConfig,
    check: Callable[[Sequence[Node]], object],
    nodes: Sequence[Node],
    reporter: Reporter,
    *,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Return when `check` raises no NoRoomError for the cluster's nodes any more.

    What is missing is asked of the autoscaler, as a placement group that waits, for up to nodes_timeout_s; `tick` is
    called meanwhile. Raises what `check` raises: NoRoomError at once where nodes_timeout_s is 0, else when it is over.
    """
    deadline = time.monotonic() + config.nodes_timeout_s
    with ExitStack() as stack:
        asked = False
        while True:
            try:
                check(nodes)
                return
            except NoRoomError as error:
                if time.monotonic() >= deadline:
                    raise
                if not asked:
                    asked = True
                    reporter.line(f"waiting up to {config.nodes_timeout_s:g} s for nodes: {error}")
                    stack.callback(remove_placement_group, _ask_for(error.needs))
            time.sleep(LOOK_EVERY_S)
            tick()
            nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]


def _ask_for(needs: Sequence[Need]) -> PlacementGroup:
    """Demand that an autoscaler sees; it goes with this process, however that ends."""
    each = [need for need in needs for _ in range(need.count) if need.cpus or need.gpus]
    bundles = [{"CPU": need.cpus, **({"GPU": need.gpus} if need.gpus else {})} for need in each]
    selectors = [dict(need.selector) for need in each]
    group: PlacementGroup = placement_group(bundles, bundle_label_selector=selectors)
    return group
