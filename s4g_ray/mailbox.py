"""The mailbox between the workers of a training run and its driver."""

from __future__ import annotations

import asyncio
from typing import Any

Message = dict[str, Any]


class Mailbox:
    """An asynchronous actor: messages of the workers to the driver, plans of the driver to the workers."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._plans: dict[int, str] = {}
        self._stopped = False
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
                    await asyncio.wait_for(self._changed.wait_for(lambda: bool(self._messages)), timeout_s)
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
        """A rank's wait for the plan of an epoch; None when the run is stopped."""
        async with self._changed:
            await self._changed.wait_for(lambda: epoch in self._plans or self._stopped)
            return self._plans.get(epoch)

    async def stop(self) -> None:
        """Let waiting ranks go home."""
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()
