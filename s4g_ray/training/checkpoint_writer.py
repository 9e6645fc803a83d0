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
        self._devices: set[torch.device] = set()  # with copies in progress

    def copy(self, value: Any) -> Any:
        """Return a value whose tensors are copies, in the same dicts and lists."""
        self._devices.clear()
        copied = self._copy(value, "")
        for device in self._devices:
            torch.cuda.synchronize(device)
        return copied

    def _copy(self, value: Any, key: str) -> Any:
        """Begin to copy; copies of CUDA tensors are complete once their device is waited for."""
        if isinstance(value, dict):
            return {name: self._copy(inner, f"{key}/{name}") for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(inner, f"{key}/{i}") for i, inner in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        if value.is_cuda:
            self._devices.add(value.device)
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
