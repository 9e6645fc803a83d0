"""Share the connections and the threads of a process among the buckets that it uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from s4g_ray.storage.s3_settings import RetryPolicy

Result = TypeVar("Result")


class Connections:
    """The connections that all stores of a process share."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self._free = threading.Semaphore(policy.max_connections)
        self._turn = threading.RLock()  # the handler of a signal may make requests, too
        # a task of each pool waits at most for those of the pools below it
        self.reads = ThreadPoolExecutor(policy.max_connections, "s4g-reads")
        self._pieces = ThreadPoolExecutor(policy.max_connections, "s4g-pieces")
        self._of_main_thread = ThreadPoolExecutor(4, "s4g-main")

    def run(self, request: Callable[[Any], Result], store: Any, count: int) -> Result:
        """Make a request that needs `count` connections, when they are free."""
        with self._turn:  # two that wait for several would wait for each other
            for _ in range(count):
                self._free.acquire()
        try:
            if threading.current_thread() is not threading.main_thread():
                return request(store)
            # signals are handled between Python's steps: not while obstore waits
            try:
                waiting = self._of_main_thread.submit(request, store)
            except RuntimeError:  # the interpreter is ending, and starts no threads
                return request(store)
            return waiting.result()
        finally:
            self._free.release(count)

    def read_pieces(
        self, read: Callable[[int], bytes], starts: Sequence[int], num_at_once: int
    ) -> list[bytes]:
        """Read the pieces that begin at `starts`, some at once; none follows one that has failed.

        Raises the first error.
        """
        waiting = iter(enumerate(starts))
        lock = threading.Lock()
        found: dict[int, bytes] = {}
        errors: list[Exception] = []

        def work() -> None:
            while not errors:
                with lock:
                    number, start = next(waiting, (0, -1))
                if start < 0:
                    return
                try:
                    found[number] = read(start)
                except Exception as error:
                    errors.append(error)

        workers = [self._pieces.submit(work) for _ in range(min(num_at_once, len(starts)))]
        for worker in workers:
            worker.result()
        if errors:
            raise errors[0]
        return [found[number] for number in sorted(found)]
