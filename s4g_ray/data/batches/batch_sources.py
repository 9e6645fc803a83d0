"""Load batches ahead, in threads of this process or in processes of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from s4g_ray.errors import DeadProcessError

Order = TypeVar("Order")  # all that is needed to load a batch
Batch = TypeVar("Batch")
AnyOrder = TypeVar("AnyOrder", contravariant=True)
AnyBatch = TypeVar("AnyBatch", covariant=True)


class BatchSource(Protocol[AnyOrder, AnyBatch]):
    """Loads the batches of orders, in their order."""

    process_ids: list[int]

    def load(self, orders: Iterator[AnyOrder]) -> Iterator[AnyBatch]:
        """Load a batch for each order. Starting the next load ends an unfinished one."""

    def count_ready(self) -> int:
        """Count the batches of the current load that are loaded and not taken yet."""

    def close(self) -> None:
        """End the processes or threads."""


class ThreadSource(Generic[Order, Batch]):
    """Loads in threads of this process; reading, decoding and resizing release the interpreter."""

    def __init__(self, make: Callable[[Order], Batch], num_threads: int) -> None:
        self.process_ids: list[int] = []
        self._make = make
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pair-loader")
        self._waiting: deque[Future[Batch]] = deque()

    def load(self, orders: Iterator[Order]) -> Iterator[Batch]:
        """Load a batch for each order; raises what making it raises."""
        waiting: deque[Future[Batch]] = deque()
        self._waiting = waiting
        try:
            while True:
                while (
                    len(waiting) <= self._num_threads and (order := next(orders, None)) is not None
                ):
                    waiting.append(self._pool.submit(self._make, order))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def count_ready(self) -> int:
        """Count the batches that are loaded and not taken yet."""
        return sum(future.done() for future in self._waiting)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


class _OrderSampler(Sampler[Order]):
    """Hands the orders to load to torch, in this process, as batches are taken."""

    def __init__(self) -> None:
        self.orders: Iterator[Order] = iter(())

    def __iter__(self) -> Iterator[Order]:
        return self.orders


class ProcessSource(Generic[Order, Batch]):
    """Loads in spawned processes: forking a process that runs Ray or has threads may deadlock.

    maker: maker[order] is the order's batch, or an exception, which load() raises here.
    """

    def __init__(self, maker: Dataset[Any], num_processes: int) -> None:
        self._sampler: _OrderSampler[Order] = _OrderSampler()
        self._num_loads = 0
        self._loader: DataLoader[Any] = DataLoader(
            maker,
            sampler=self._sampler,
            batch_size=None,  # an item is a batch
            collate_fn=_keep_item,
            num_workers=num_processes,
            multiprocessing_context="spawn",
            persistent_workers=True,
            generator=torch.Generator(),  # the process's own would be advanced, and dropout with it
        )
        # Not in the main thread: torch would set a handler there that raises from any line when a
        # process dies.
        with ThreadPoolExecutor(1) as pool:
            started: Future[Any] = pool.submit(iter, self._loader)
            self._items = started.result()
        self.process_ids: list[int] = [worker.pid for worker in self._items._workers]

    def load(self, orders: Iterator[Order]) -> Iterator[Batch]:
        """Load a batch for each order. Raises DeadProcessError when a process has died."""
        self._num_loads += 1
        number = self._num_loads
        self._sampler.orders = orders
        # Discards the batches that an unfinished load ordered.
        items = self._watch_processes(iter, self._loader)
        while (item := self._watch_processes(next, items, None)) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            if number != self._num_loads:
                raise RuntimeError("a load was continued after the next had begun")

    def _watch_processes(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that waits for processes. Raises DeadProcessError when one has died."""
        try:
            return function(*args)
        except (RuntimeError, OSError, EOFError) as error:  # which of them depends on timing
            workers = self._items._workers
            ended = wait([worker.sentinel for worker in workers], timeout=1)
            dead = next((worker for worker in workers if worker.sentinel in ended), None)
            if dead is None:
                raise
            dead.join()
            raise DeadProcessError(
                f"loader process {dead.pid} died with exit code {dead.exitcode}; if memory (-9)"
                " or /dev/shm (-7) ran out, lower train.loader_processes"
            ) from error

    def count_ready(self) -> int:
        """Count batches in the queue to this process, and those taken from it before their turn."""
        tasks = self._items._task_info.values()  # torch has no public way
        num_early = sum(len(task) == 2 for task in tasks)  # of a process and its answer
        return num_early + int(self._items._data_queue.qsize())

    def close(self) -> None:
        """End the processes."""
        self._items._shutdown_workers()  # torch has no public way


def _keep_item(item: Any) -> Any:
    return item
