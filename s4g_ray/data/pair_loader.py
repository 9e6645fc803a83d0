"""Load batches of pairs ahead of the training step, by threads or by processes.

A pair's augmentation is drawn from (seed, epoch, query id), and that of a reference without a query
from its own id, so it is the same in any process or thread. Loader processes hold neither plans nor
image tables: each batch is sent to them as the few rows that it needs, so they always load batches
of the current plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.connection import wait
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from s4g_ray.arrays import Ints
from s4g_ray.config.data_schema import AugmentConfig, DataConfig
from s4g_ray.data.augmentation import augment_pair, augment_reference
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.images import (
    ImageFile,
    crop_field_of_view,
    fit_query,
    fit_reference,
    list_image_files,
    read_images,
)
from s4g_ray.errors import BadImageError, DeadProcessError, StoreError

NUM_THREADS = 2  # where there are no loader processes
# Each separates one random stream of augmentation from others of the same (seed, epoch).
_AUGMENT_STREAM = 0x617567
_GALLERY_STREAM = 0x676175  # of references without a query


@dataclass(frozen=True)
class PairBatch:
    """A rank's share of a global batch: uint8 [b, 3, H, W] for each view, valid[b] bool.

    gallery: references without a query, uint8 [e, 3, H, W], of gallery_ids[e], gallery_valid[e]
    bool; None where the plan has none.
    """

    number: int  # of the batch in its plan
    query_ids: Ints  # -1: an empty slot
    queries: Tensor
    references: Tensor
    valid: Tensor  # false: an empty slot, or an undecodable image (data.on_bad_image=skip)
    bad_images: tuple[str, ...]  # reasons
    gallery: Tensor | None = None
    gallery_ids: Ints | None = None
    gallery_valid: Tensor | None = None  # false: undecodable as above, or its id is -1

    @property
    def pairs_masked(self) -> int:
        """Count the pairs that could not be decoded."""
        return int((self.query_ids >= 0).sum() - self.valid.sum())

    @property
    def gallery_masked(self) -> int:
        """Count the gallery images that could not be decoded."""
        if self.gallery_ids is None or self.gallery_valid is None:
            return 0
        return int((self.gallery_ids >= 0).sum() - self.gallery_valid.sum())

    def _map(self, function: Callable[[Tensor], Tensor]) -> PairBatch:
        """Return the batch with each of its tensors replaced by function(tensor)."""
        tensors = {
            item.name: function(value)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **tensors)

    def pin(self) -> PairBatch:
        """Return the batch in pinned memory, from which it is moved without waiting."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> PairBatch:
        """Return the batch on a device; does not wait where it lies in pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the batch until a CUDA stream has used it."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def without_images(self) -> PairBatch:
        """Return the batch with ids and flags alone."""
        none = torch.empty(0)  # a slice would keep the memory of all
        return replace(self, queries=none, references=none, gallery=None)


@dataclass(frozen=True)
class _BatchOrder:
    """A batch to load: all that is sent to a loader process.

    Files are those of the ids that are not -1, in their order.
    """

    number: int
    epoch: int
    query_ids: Ints
    queries: list[ImageFile]
    references: list[ImageFile]
    gallery_ids: Ints | None
    gallery: list[ImageFile]


class PairLoader:
    """Loads a rank's slots of a plan, batch after batch, ahead of the training step.

    num_processes: loader processes. They start at once, serve all epochs, and end with close() or
    some seconds after the process that made them died. 0: threads of this process load instead.
    Every number gives the same batches.
    """

    def __init__(
        self,
        queries: ImageTable,
        references: ImageTable,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        num_processes: int = 0,
    ) -> None:
        self.queries = queries
        self.references = references
        maker = _BatchMaker(data, augment, seed)
        self._source: _BatchSource
        if num_processes:
            self._source = _ProcessSource(maker, num_processes)
        else:
            self._source = _ThreadSource(maker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes or threads; nothing can be loaded afterwards."""
        self._source.close()

    @property
    def num_ready(self) -> int:
        """Count the batches of the current load that are loaded and not taken yet."""
        return self._source.count_ready()

    @property
    def process_ids(self) -> list[int]:
        """Return the ids of the loader processes; none where threads load."""
        return self._source.process_ids

    def load(
        self,
        query_ids: Ints,
        reference_ids: Ints,
        *,
        epoch: int,
        gallery_ids: Ints | None = None,
        first: int = 0,
    ) -> Iterator[PairBatch]:
        """Load batches `first`.. B - 1 of a plan, in order.

        query_ids[B, b], reference_ids[B, b], gallery_ids[B, e]; -1 is an empty slot. One load runs
        at a time: starting the next ends an unfinished one. Raises BadImageError if
        data.on_bad_image is `fail`, KeyError for an unknown id, DeadProcessError when a loader
        process died.
        """
        return self._source.load(self._order(query_ids, reference_ids, gallery_ids, epoch, first))

    def _order(
        self,
        query_ids: Ints,
        reference_ids: Ints,
        gallery_ids: Ints | None,
        epoch: int,
        first: int,
    ) -> Iterator[_BatchOrder]:
        for number in range(first, len(query_ids)):
            gallery = None if gallery_ids is None else gallery_ids[number]
            yield _BatchOrder(
                number,
                epoch,
                query_ids[number],
                _find_files(self.queries, query_ids[number]),
                _find_files(self.references, reference_ids[number]),
                gallery,
                [] if gallery is None else _find_files(self.references, gallery),
            )


def _find_files(table: ImageTable, ids: Ints) -> list[ImageFile]:
    return list_image_files(table, table.rows(ids[ids >= 0]).tolist())


@dataclass(frozen=True)
class _BatchMaker(Dataset[PairBatch | BadImageError | StoreError]):
    """Makes batches, the same in any process and thread."""

    data: DataConfig
    augment: AugmentConfig
    seed: int

    def __getitem__(self, order: _BatchOrder) -> PairBatch | BadImageError | StoreError:
        """Make a batch, or return its error.

        If it were raised, torch would hide its message in the traceback of a process.
        """
        try:
            return self.make(order)
        except (BadImageError, StoreError) as error:
            return error

    def make(self, order: _BatchOrder) -> PairBatch:
        """Read, decode, resize and augment the images of a batch.

        Raises BadImageError if data.on_bad_image is `fail`.
        """
        bad: list[str] = []
        queries = _make_blank(len(order.query_ids), self.data.visible_query_size)
        references = _make_blank(len(order.query_ids), self.data.reference_size)
        valid = torch.zeros(len(order.query_ids), dtype=torch.bool)
        pairs = zip(
            _find_filled_slots(order.query_ids),
            order.queries,
            read_images(order.queries),
            read_images(order.references),
            strict=True,
        )
        for slot, file, query, reference in pairs:
            if isinstance(query, BadImageError):
                self._record_bad_image(query, bad)
            elif isinstance(reference, BadImageError):
                self._record_bad_image(reference, bad)
            else:
                pair = self._augment_pair(file, query, reference, order.epoch)
                queries[slot], references[slot] = pair
                valid[slot] = True
        gallery, gallery_valid = self._make_gallery(order, bad)
        return PairBatch(
            order.number,
            order.query_ids,
            queries,
            references,
            valid,
            tuple(bad),
            gallery,
            order.gallery_ids,
            gallery_valid,
        )

    def _make_gallery(
        self, order: _BatchOrder, bad: list[str]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Load gallery[e, 3, H, W] and gallery_valid[e]; None where the plan has no gallery."""
        if order.gallery_ids is None:
            return None, None
        images = _make_blank(len(order.gallery_ids), self.data.reference_size)
        valid = torch.zeros(len(order.gallery_ids), dtype=torch.bool)
        slots = _find_filled_slots(order.gallery_ids)
        fit = partial(fit_reference, data=self.data)
        for slot, file, image in zip(slots, order.gallery, read_images(order.gallery), strict=True):
            if isinstance(image, BadImageError):
                self._record_bad_image(image, bad)
                continue
            rng = np.random.default_rng((self.seed, order.epoch, file.id, _GALLERY_STREAM))
            images[slot] = augment_reference(image, self.augment, rng, fit)
            valid[slot] = True
        return images, valid

    def _record_bad_image(self, error: BadImageError, bad: list[str]) -> None:
        """Append the reason to `bad`. Raises the error if data.on_bad_image is `fail`."""
        if self.data.on_bad_image == "fail":
            raise error
        bad.append(str(error))

    def _augment_pair(
        self, file: ImageFile, query: Tensor, reference: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, epoch, file.id, _AUGMENT_STREAM))
        fits = (
            partial(fit_query, data=self.data, heading=file.heading),
            partial(fit_reference, data=self.data),
        )
        panorama, tile = augment_pair(query, reference, self.augment, rng, fits)
        # Cropped last: rolling with the tile needs the whole circle.
        return crop_field_of_view(panorama, self.data, rng), tile


def _make_blank(count: int, size: tuple[int, int]) -> Tensor:
    return torch.zeros(count, 3, *size, dtype=torch.uint8)


def _find_filled_slots(ids: Ints) -> list[int]:
    slots: list[int] = np.flatnonzero(ids >= 0).tolist()
    return slots


class _BatchSource(Protocol):
    """Loads the batches of orders, in their order."""

    process_ids: list[int]

    def load(self, orders: Iterator[_BatchOrder]) -> Iterator[PairBatch]: ...

    def count_ready(self) -> int: ...

    def close(self) -> None: ...


class _ThreadSource:
    """Loads in threads of this process; reading, decoding and resizing release the interpreter."""

    def __init__(self, maker: _BatchMaker) -> None:
        self.process_ids: list[int] = []
        self._maker = maker
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="pair-loader")
        self._waiting: deque[Future[PairBatch]] = deque()

    def load(self, orders: Iterator[_BatchOrder]) -> Iterator[PairBatch]:
        waiting: deque[Future[PairBatch]] = deque()
        self._waiting = waiting
        try:
            while True:
                while len(waiting) <= NUM_THREADS and (order := next(orders, None)) is not None:
                    waiting.append(self._pool.submit(self._maker.make, order))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def count_ready(self) -> int:
        return sum(future.done() for future in self._waiting)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _OrderSampler(Sampler[_BatchOrder]):
    """Hands the orders to load to torch, in this process, as batches are taken."""

    def __init__(self) -> None:
        self.orders: Iterator[_BatchOrder] = iter(())

    def __iter__(self) -> Iterator[_BatchOrder]:
        return self.orders


class _ProcessSource:
    """Loads in spawned processes: forking a process that runs Ray or has threads may deadlock."""

    def __init__(self, maker: _BatchMaker, num_processes: int) -> None:
        self._sampler = _OrderSampler()
        self._num_loads = 0
        self._loader: DataLoader[PairBatch | BadImageError | StoreError] = DataLoader(
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

    def load(self, orders: Iterator[_BatchOrder]) -> Iterator[PairBatch]:
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
        self._items._shutdown_workers()  # torch has no public way


def _keep_item(item: Any) -> Any:
    return item
