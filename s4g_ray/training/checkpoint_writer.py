"""Publish checkpoints in a thread, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor


class Snapshot:
    """A copy of tensors in memory of the host, which the next snapshot uses again.

    Pinned where tensors come from a GPU, so that they are copied at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, value: Any, key: str = "") -> Any:
        """Return a value whose tensors are copies, in the same dicts and lists.

        The copies of CUDA tensors are complete only after torch.cuda.synchronize().
        """
        if isinstance(value, dict):
            return {name: self.copy(inner, f"{key}/{name}") for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.copy(inner, f"{key}/{i}") for i, inner in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)


class CheckpointWriter:
    """Writes one checkpoint at a time; a context manager that waits for the last.

    What publishing raises is raised by the next call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._in_flight: Future[None] | None = None
        self._snapshot = Snapshot()

    def submit(self, state: Any, publish: Callable[[Any], None]) -> None:
        """Copy the tensors of a state, then call publish(copy) in the thread.

        Waits for the checkpoint before this one; the caller pays for the copy alone.
        """
        self.wait()
        copy = self._snapshot.copy(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._in_flight = self._thread.submit(publish, copy)

    def check(self) -> None:
        """Raise what the last checkpoint failed with, if it has ended."""
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is published."""
        if self._in_flight is not None:
            in_flight = self._in_flight
            self._in_flight = None
            in_flight.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()
