"""Batcher: work that waits while a batch is done becomes the next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Do items in batches, one batch at a time, in a thread of its own.

    An item that arrives while nothing is done starts at once; those that arrive meanwhile form the
    next batch. `ray.serve.batch` forms a batch before the one in progress has ended, so that
    batches stay small or, with a longer wait, a single request waits for nothing.

    work: returns a result an item, in order. size_of: what an item counts towards max_size; an item
    above it is a batch of its own. Use it from one event loop.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_size: int,
        size_of: Callable[[Item], int] = lambda _item: 1,
    ) -> None:
        self._work = work
        self._max_size = max_size
        self._size_of = size_of
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")

    def __len__(self) -> int:
        """Return the number of items that wait."""
        return len(self._waiting)

    async def submit(self, item: Item) -> Result:
        """Return the result of an item. An error of its batch is raised for all items in it."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch = self._take_batch()
                if not batch:
                    continue
                try:
                    items = [item for item, _ in batch]
                    results = await loop.run_in_executor(self._thread, self._work, items)
                except Exception as error:
                    _fail(batch, error)
                    continue
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
        finally:
            self._task = None

    def _take_batch(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """Take the next batch; leave out items whose caller has gone."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        size = 0
        while self._waiting:
            item, future = self._waiting[0]
            if future.done():
                self._waiting.popleft()
                continue
            size += self._size_of(item)
            if batch and size > self._max_size:
                break
            batch.append(self._waiting.popleft())
        return batch


def _fail(batch: Sequence[tuple[Item, asyncio.Future[Result]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
