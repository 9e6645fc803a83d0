"""Carry messages between the workers of a training run and its driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

Message = dict[str, Any]
Stop = Literal["stop", "save"]  # save: publish a checkpoint before stopping


class Mailbox:
    """An asynchronous actor between the workers and the driver.

    Workers post messages to the driver. The driver posts the plan of each epoch, and tells the
    workers to stop.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._plans: dict[int, str] = {}
        # by epoch: the answer to the first rank that asked, which all ranks get
        self._answers: dict[int, str | None] = {}
        self._stop: Stop | None = None
        self._is_moving = False  # this group of workers leaves its nodes
        self._controller: Any = None  # a handle of Ray Train's
        self._changed = asyncio.Condition()

    async def post(self, message: Message) -> None:
        """Post a worker's message to the driver."""
        async with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    async def take(self, timeout_s: float) -> list[Message]:
        """Remove and return all messages; wait for the first of them for up to timeout_s."""
        async with self._changed:
            if not self._messages:
                try:
                    await asyncio.wait_for(
                        self._changed.wait_for(lambda: bool(self._messages)), timeout_s
                    )
                except TimeoutError:
                    return []
            messages = self._messages
            self._messages = []
            return messages

    async def put_plan(self, epoch: int, uri: str) -> None:
        """Post the driver's plan of an epoch."""
        async with self._changed:
            self._plans[epoch] = uri
            self._changed.notify_all()

    async def wait_for_plan(self, epoch: int) -> str | None:
        """Wait for the plan of an epoch and return its URI; None when the workers are to stop.

        All ranks get the same answer.
        """
        await self._wait(lambda: epoch in self._plans or self._must_end)
        return self._answers.setdefault(epoch, None if self._must_end else self._plans[epoch])

    async def stop(self, how: Stop = "stop") -> None:
        """Tell all ranks to stop: waiting ranks at once, the others after their step."""
        async with self._changed:
            self._stop = self._stop or how
            self._changed.notify_all()

    async def wait_for_stop(self) -> Stop:
        """Wait until the ranks are told to stop; return how. Those that must move save first."""
        await self._wait(lambda: self._must_end)
        return self._stop or "save"

    async def is_stopped(self) -> bool:
        """Return whether the driver has stopped the run."""
        return self._stop is not None

    async def move(self) -> None:
        """Tell all ranks to publish a checkpoint and end: their nodes are about to be lost."""
        async with self._changed:
            self._is_moving = True
            self._changed.notify_all()

    async def must_move(self) -> bool:
        """Return whether the ranks ended in order to continue on other nodes."""
        return self._is_moving and self._stop is None

    async def set_controller(self, controller: Any) -> None:
        """Keep a handle of Ray Train's controller."""
        self._controller = controller

    async def get_controller(self) -> Any:
        """Return the handle of Ray Train's controller; None before it has started."""
        return self._controller

    async def start_group(self) -> None:
        """Forget that the group of workers before was told to move."""
        async with self._changed:
            self._is_moving = False
            answers = self._answers.items()
            self._answers = {epoch: plan for epoch, plan in answers if plan is not None}

    @property
    def _must_end(self) -> bool:
        return self._stop is not None or self._is_moving

    async def _wait(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)
