"""Ask an autoscaler for missing nodes, and wait for them, before a command starts its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from s4g_ray.config.schema import RayConfig
from s4g_ray.distributed.placement import UNIT, Need, Node, NoRoomError, nodes_of
from s4g_ray.progress import Reporter

CHECK_EVERY_S = 1.0


def await_room(
    config: RayConfig,
    check: Callable[[Sequence[Node]], object],
    nodes: Sequence[Node],
    reporter: Reporter,
    *,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Wait until `check` raises no NoRoomError for the nodes of the cluster.

    Requests the missing resources from the autoscaler, as a pending placement group, for up to
    nodes_timeout_s. Calls `tick` before each further check. Raises the error of `check`:
    NoRoomError after nodes_timeout_s (at once when that is 0), any other error immediately.
    """
    deadline = time.monotonic() + config.nodes_timeout_s
    with ExitStack() as stack:
        has_asked = False
        while True:
            try:
                check(nodes)
                return
            except NoRoomError as error:
                if time.monotonic() >= deadline:
                    raise
                if not has_asked:
                    has_asked = True
                    reporter.line(f"waiting up to {config.nodes_timeout_s:g} s for nodes: {error}")
                    stack.callback(remove_placement_group, _request(error.needs))
            time.sleep(CHECK_EVERY_S)
            tick()
            nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]


def _request(needs: Sequence[Need]) -> PlacementGroup:
    """Create a placement group that an autoscaler sees as demand.

    Ray removes it when this process ends, however that happens.
    """
    bundles = []
    selectors = []
    for need in needs:
        bundle = {"CPU": need.cpus}
        if need.gpus:
            bundle["GPU"] = need.gpus
        if need.memory_gb:
            bundle["memory"] = need.memory_gb * 1e9
        if not any(bundle.values()):
            if not need.selector:
                continue
            bundle["CPU"] = 1 / UNIT  # a node that its labels select is needed all the same
        for _ in range(need.count):
            bundles.append(dict(bundle))
            selectors.append(dict(need.selector))
    group: PlacementGroup = placement_group(bundles, bundle_label_selector=selectors)
    return group
