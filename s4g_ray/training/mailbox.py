"""The mailbox between the workers of a training run and its driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

Message = dict[str, Any]
Stop = Literal["stop", "save"]  # save: publish a checkpoint first


class Mailbox:
    """An asynchronous actor: messages of the workers to the driver; plans, and the word to stop, to the workers."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._plans: dict[int, str] = {}
        self._answers: dict[
            int, str | None
        ] = {}  # to the first rank that asked for an epoch, and so to all
        self._stop: Stop | None = None
        self._changed = asyncio.Condition()

    async def post(self, message: Message) -> None:
        """A worker's message to the driver."""
        async with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    async def take(self, timeout_s: float) -> list[Message]:
        """All new messages, after waiting for the first of them up to a time."""
        async with self._changed:
            if not self._messages:
                try:
                    await asyncio.wait_for(
                        self._changed.wait_for(lambda: bool(self._messages)), timeout_s
                    )
                except TimeoutError:
                    return []
            taken, self._messages = self._messages, []
            return taken

    async def put_plan(self, epoch: int, uri: str) -> None:
        """The driver's plan of an epoch."""
        async with self._changed:
            self._plans[epoch] = uri
            self._changed.notify_all()

    async def plan(self, epoch: int) -> str | None:
        """A rank's wait for the plan of an epoch; None when the run is stopped. All ranks get the same answer."""
        await self._wait(lambda: epoch in self._plans or self._stop is not None)
        return self._answers.setdefault(epoch, None if self._stop else self._plans[epoch])

    async def stop(self, how: Stop = "stop") -> None:
        """Let ranks go home: those that wait at once, others after their step."""
        async with self._changed:
            self._stop = self._stop or how
            self._changed.notify_all()

    async def stopped(self) -> Stop:
        """A rank's wait for the word to stop."""
        await self._wait(lambda: self._stop is not None)
        assert self._stop is not None
        return self._stop

    async def is_stopped(self) -> bool:
        """Whether the word to stop has been given."""
        return self._stop is not None

    async def _wait(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)
