"""Move batches to the device of training, one ahead of the step that uses them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from s4g_ray.data.batches.pair_batch import PairBatch


class DevicePrefetch:
    """Moves each batch to the device while the step before it runs, and augments it there.

    On CUDA, from pinned memory and on a stream of its own. A step starts when its batch is there;
    the host does not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batches: Iterator[PairBatch]) -> Iterator[tuple[PairBatch, float]]:
        """Yield the batches on the device, each with the seconds that the host waited for it."""
        batch, waited_s = self._take(batches)
        while batch is not None:
            if self._stream is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._stream)
                batch.record_stream(torch.cuda.current_stream(self._device))
            yield batch, waited_s
            batch, waited_s = self._take(batches)

    def _take(self, batches: Iterator[PairBatch]) -> tuple[PairBatch | None, float]:
        """Take the next loaded batch, and begin to move it."""
        began = time.perf_counter()
        batch = next(batches, None)
        waited_s = time.perf_counter() - began
        if batch is None:
            return None, waited_s
        if self._stream is None:
            return batch.to(self._device).augment(), waited_s
        with torch.cuda.stream(self._stream):
            return batch.pin().to(self._device).augment(), waited_s
