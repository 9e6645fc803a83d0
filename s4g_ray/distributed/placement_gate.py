"""Place the workers of a training before the actors that run beside them.

Ray puts a share of a GPU where it fits best. Embedding actors of 0.4 GPU that start first lie on
the same GPUs, two on each; a worker of 0.6 then finds no room, although the sum would allow it. So
actors start when the workers are placed. Where they share GPUs, they make room whenever workers
have to be placed again: Ray restarts an actor that was lost with its node at once, and it would
take the GPU of a worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Self

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s4g_ray.distributed.placement import nodes_of
from s4g_ray.errors import RunError, reason_of

POLL_S = 1.0  # between two checks whether a wait for the gate must end


class Gate:
    """An asynchronous Ray actor: open while workers are placed, closed while they are being placed.

    The process that places workers closes and opens it. Actors may start while it is open, if they
    are admitted. releases: whether closing kills the admitted actors; else it stays open after the
    workers were placed once.
    """

    def __init__(self, releases: bool) -> None:
        self._releases = releases
        self._is_open = False
        self._num_releases = 0
        self._admitted: list[Any] = []
        self._changed = asyncio.Condition()

    async def close(self) -> None:
        """Kill the admitted actors and admit no others, until the gate opens."""
        async with self._changed:
            if not self._releases:
                return
            self._is_open = False
            self._num_releases += 1
            # without restarts, and those that Ray is starting again or has no room for, too
            for actor in self._admitted:
                ray.kill(actor)
            self._admitted = []

    async def open(self) -> None:
        """Admit actors from now on: the workers are placed."""
        async with self._changed:
            self._is_open = True
            self._changed.notify_all()

    async def wait_until_open(self, timeout_s: float) -> int | None:
        """Return the number of releases so far; None if the gate stays closed for timeout_s."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._is_open), timeout_s)
            except TimeoutError:
                return None
            return self._num_releases

    async def admit(self, actors: list[Any], num_releases: int) -> bool:
        """Admit actors that were created after `num_releases`; False if there were more since."""
        async with self._changed:
            if not self._is_open or num_releases != self._num_releases:
                return False
            self._admitted.extend(actors)
            return True

    async def num_releases(self) -> int:
        """Return how often the gate has closed."""
        return self._num_releases


class PlacementGate:
    """The driver's access to a Gate on its own node."""

    def __init__(self, *, releases: bool) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = (
            ray.remote(Gate).options(num_cpus=0, scheduling_strategy=here).remote(releases)
        )

    def wait_until_open(self, check: Callable[[], None]) -> int:
        """Wait until workers are placed; return the number of releases so far.

        Calls check() while it waits, which may raise.
        """
        while True:
            check()
            num_releases: int | None = self._ask(self.actor.wait_until_open, POLL_S)
            if num_releases is not None:
                return num_releases

    def admit(self, actors: Sequence[Any], num_releases: int) -> bool:
        """Admit new actors; return False where the gate has closed since `num_releases`."""
        return bool(self._ask(self.actor.admit, list(actors), num_releases))

    def has_released(self, num_releases: int) -> bool:
        """Return whether the gate has closed since `num_releases`."""
        return bool(self._ask(self.actor.num_releases) != num_releases)

    def _ask(self, method: Any, *arguments: Any) -> Any:
        try:
            return ray.get(method.remote(*arguments))
        except RayError as error:
            raise RunError(
                f"the actor that orders the placement died: {reason_of(error)}; resume"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        ray.kill(self.actor)


def make_gate(has_shared_gpus: bool) -> PlacementGate | None:
    """Return a gate, still closed, where the order of placement matters; else None.

    That is on several nodes, and where workers and actors share GPUs. CPUs of one node are a sum:
    any order does.
    """
    if not has_shared_gpus and len(nodes_of(ray.nodes())) == 1:  # type: ignore[no-untyped-call]
        return None
    return PlacementGate(releases=has_shared_gpus)
