"""Read and decode the images of a block ahead of the encoder, in threads, into reused buffers.

Reading, decoding and resizing release the interpreter. Buffers hold interleaved pixels, as decoders
give them; on GPUs they are page-locked, so that copies run beside the encoder. The number of
buffers limits how far decoding is ahead: threads wait when the encoder is slower.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from s4g_ray.arrays import Ints
from s4g_ray.config.data_schema import DataConfig, Size
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import ImageArray, Pixels, load_pixels
from s4g_ray.errors import BadImageError

# images that one thread reads together and decodes one by one: fewer than a batch, for the threads
# to share it
CHUNKS = (8, 64)
Shape = tuple[int, int, int, int]
Bad = list[tuple[int, BadImageError]]  # row, reason


def image_size(data: DataConfig, view: View) -> Size:
    """Return the height and width of a view's images as the encoder takes them."""
    return data.visible_query_size if view == "queries" else data.reference_size


class BufferPool:
    """Buffers uint8 [b, H, W, 3] of at most max_bytes in all, and at least one."""

    def __init__(self, max_bytes: int, pin: bool) -> None:
        self._max_bytes = max_bytes
        self._pin = pin
        self._free: list[Tensor] = []
        self._num_bytes = 0  # of all buffers, free and in use
        self._changed = threading.Condition()

    def take(self, shape: Shape, *, wait: bool) -> Tensor | None:
        """Take a buffer; None if there is none and not `wait`."""
        size = int(np.prod(shape))
        with self._changed:
            while True:
                for i, buffer in enumerate(self._free):
                    if tuple(buffer.shape) == shape:
                        return self._free.pop(i)
                while self._free and self._num_bytes + size > self._max_bytes:
                    self._num_bytes -= self._free.pop().numel()
                if self._num_bytes == 0 or self._num_bytes + size <= self._max_bytes:
                    self._num_bytes += size
                    return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
                if not wait:
                    return None
                self._changed.wait()

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer that is not in use any more."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def clear(self) -> None:
        """Free the memory of buffers that are not in use."""
        with self._changed:
            self._num_bytes -= sum(buffer.numel() for buffer in self._free)
            self._free.clear()
            self._changed.notify_all()


@dataclass
class DecodedBatch:
    """The images of a batch that could be decoded, and the others.

    images: uint8 [b, 3, H, W], a view of a buffer; rows[b] of the block. Give the buffer back when
    the images were used.
    """

    images: Tensor
    rows: Ints
    bad: Bad
    buffer: Tensor


class DecodeAhead:
    """Threads that decode batches ahead, with at most max_bytes of pixels; safe for many blocks."""

    def __init__(self, num_threads: int, max_bytes: int, *, pin: bool) -> None:
        # one thread of torch each, for images that are resized: decoders share the cores
        self._threads = ThreadPoolExecutor(
            num_threads, "decoder", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._num_threads = num_threads
        self.buffers = BufferPool(max_bytes, pin)

    def batches(
        self,
        table: ImageTable,
        order: Ints,
        view: View,
        data: DataConfig,
        *,
        seed: int,
        batch_size: int,
    ) -> Generator[DecodedBatch, None, None]:
        """Decode the rows `order` of a table, batch_size at a time, in that order.

        A batch decodes while those before it are encoded. Raises StoreError when the object store
        fails.
        """
        load = partial(load_pixels, table, view=view, data=data, seed=seed)
        height, width = image_size(data, view)
        shape = (min(batch_size, len(order)), height, width, 3)
        pending: deque[_Decoding] = deque()
        start = 0
        try:
            while start < len(order) or pending:
                while start < len(order):
                    # only with nothing to yield may this wait for the encoder
                    buffer = self.buffers.take(shape, wait=not pending)
                    if buffer is None:
                        break
                    rows = order[start : start + batch_size]
                    chunk = int(np.clip(-(-len(rows) // self._num_threads), *CHUNKS))
                    decoding = _Decoding(rows, buffer)
                    pending.append(decoding)
                    for first in range(0, len(rows), chunk):
                        own = slice(first, first + chunk)
                        task = partial(_decode_chunk, load, rows[own], buffer[own].numpy())
                        decoding.chunks.append(self._threads.submit(task))
                    start += batch_size
                batch = pending[0].finish()
                pending.popleft()
                yield batch
        finally:
            for decoding in pending:
                decoding.stop()
                self.buffers.give_back(decoding.buffer)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)


class _Decoding:
    """A batch that threads are decoding."""

    def __init__(self, rows: Ints, buffer: Tensor) -> None:
        self.rows = rows
        self.buffer = buffer
        self.chunks: list[Future[Bad]] = []

    def finish(self) -> DecodedBatch:
        """Wait for the threads; move the images together where some are missing."""
        bad: Bad = []
        for chunk in self.chunks:
            bad.extend(chunk.result())
        rows = self.rows
        images = self.buffer[: len(rows)]
        if bad:
            bad_rows = [row for row, _ in bad]
            good = np.flatnonzero(~np.isin(rows, bad_rows))
            images = images[torch.from_numpy(good)]
            rows = rows[good]
        return DecodedBatch(images.permute(0, 3, 1, 2), rows, bad, self.buffer)

    def stop(self) -> None:
        """Wait until no thread writes into the buffer."""
        for chunk in self.chunks:
            if not chunk.cancel():
                chunk.exception()


def _decode_chunk(
    load: partial[Iterator[ImageArray | BadImageError]], rows: Ints, target: Pixels
) -> Bad:
    """Decode rows into target[n, H, W, 3]; return those that cannot be decoded."""
    bad: Bad = []
    for i, image in enumerate(load(rows.tolist(), targets=list(target))):
        if isinstance(image, BadImageError):
            bad.append((int(rows[i]), image))
        elif not np.may_share_memory(image, target[i]):  # else it was decoded there
            target[i] = np.moveaxis(image, 0, -1)
    return bad
