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
        """Wait for the plan of an epoch and return its URI; None when the run is stopped.

        All ranks get the same answer.
        """
        await self._wait(lambda: epoch in self._plans or self._stop is not None)
        return self._answers.setdefault(epoch, None if self._stop else self._plans[epoch])

    async def stop(self, how: Stop = "stop") -> None:
        """Tell all ranks to stop: waiting ranks at once, the others after their step."""
        async with self._changed:
            self._stop = self._stop or how
            self._changed.notify_all()

    async def wait_for_stop(self) -> Stop:
        """Wait until the driver tells the ranks to stop; return how."""
        await self._wait(lambda: self._stop is not None)
        assert self._stop is not None
        return self._stop

    async def is_stopped(self) -> bool:
        """Return whether the driver has stopped the run."""
        return self._stop is not None

    async def _wait(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)
