"""Batches of pairs, loaded ahead of the training step by threads or by processes.

A pair's augmentation is drawn from (seed, epoch, query id), and that of a reference without a query from its own id: it
looks the same whatever loads it. Loader processes hold neither plans nor image tables: each batch is sent to them as
the few rows that it needs, so what they load is always of the plan at hand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import AugmentConfig, DataConfig
from s4g_ray.data.augmentation import augment_pair, augment_reference
from s4g_ray.data.images import (
    ImageFile,
    crop_field_of_view,
    fit_query,
    fit_reference,
    image_files,
    read_images,
)
from s4g_ray.errors import BadImageError, DeadProcessError, StoreError

if TYPE_CHECKING:  # as in images.py
    from s4g_ray.data.image_table import ImageTable

NUM_THREADS = 2  # where there are no loader processes
_AUGMENT_STREAM = (
    0x617567  # keeps augmentation's random stream apart from others of the same (seed, epoch)
)
_GALLERY_STREAM = 0x676175  # as above, of references without a query


@dataclass(frozen=True)
class PairBatch:
    """A rank's share of a global batch: uint8 [b, 3, H, W] for each view, valid[b] bool.

    gallery: references without a query, uint8 [e, 3, H, W], of gallery_ids[e], gallery_valid[e] bool; None
    where none were asked for.
    """

    number: int  # of the batch in its plan
    query_ids: Ints  # -1: an empty slot
    queries: Tensor
    references: Tensor
    valid: Tensor  # false: the slot is empty, or an image could not be decoded (data.on_bad_image=skip)
    bad_images: tuple[str, ...]  # reasons
    gallery: Tensor | None = None
    gallery_ids: Ints | None = None
    gallery_valid: Tensor | None = None  # false: as above, or its id is -1

    @property
    def pairs_masked(self) -> int:
        """How many pairs could not be decoded."""
        return int((self.query_ids >= 0).sum() - self.valid.sum())

    @property
    def gallery_masked(self) -> int:
        """How many gallery images could not be decoded."""
        if self.gallery_ids is None or self.gallery_valid is None:
            return 0
        return int((self.gallery_ids >= 0).sum() - self.gallery_valid.sum())


@dataclass(frozen=True)
class _Order:
    """A batch to load: all that a loader process is told. Files are of the ids that are not -1, in their order."""

    number: int
    epoch: int
    query_ids: Ints
    queries: list[ImageFile]
    references: list[ImageFile]
    gallery_ids: Ints | None
    gallery: list[ImageFile]


class PairLoader:
    """Loads a rank's slots of a plan, batch after batch, ahead of the training step.

    num_processes: that load; they start at once, stay for all epochs, and end with close(), or some seconds after the
    process that made them died. 0: threads of this process. Every number gives the same batches.
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
        self.queries, self.references = queries, references
        maker = _BatchMaker(data, augment, seed)
        self._source: _Source = (
            _Processes(maker, num_processes) if num_processes else _Threads(maker)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes or threads; nothing can be loaded afterwards."""
        self._source.close()

    @property
    def num_ready(self) -> int:
        """Batches of the load in progress that are loaded and not taken yet."""
        return self._source.num_ready()

    def load(
        self,
        query_ids: Ints,
        reference_ids: Ints,
        *,
        epoch: int,
        gallery_ids: Ints | None = None,
        first: int = 0,
    ) -> Iterator[PairBatch]:
        """query_ids[B, b], reference_ids[B, b], gallery_ids[B, e] (-1: none) -> batches `first`.. B - 1, in order.

        One load at a time: the next may begin when this one was left unfinished, which is then over. Raises
        BadImageError if so configured, KeyError for an unknown id, DeadProcessError when a loader process died.
        """
        return self._source.load(self._orders(query_ids, reference_ids, gallery_ids, epoch, first))

    def _orders(
        self,
        query_ids: Ints,
        reference_ids: Ints,
        gallery_ids: Ints | None,
        epoch: int,
        first: int,
    ) -> Iterator[_Order]:
        for number in range(first, len(query_ids)):
            gallery = None if gallery_ids is None else gallery_ids[number]
            yield _Order(
                number,
                epoch,
                query_ids[number],
                _files(self.queries, query_ids[number]),
                _files(self.references, reference_ids[number]),
                gallery,
                [] if gallery is None else _files(self.references, gallery),
            )


def _files(table: ImageTable, ids: Ints) -> list[ImageFile]:
    return image_files(table, table.rows(ids[ids >= 0]).tolist())


@dataclass(frozen=True)
class _BatchMaker(Dataset[PairBatch | BadImageError | StoreError]):
    """Makes batches, the same in any process and thread."""

    data: DataConfig
    augment: AugmentConfig
    seed: int

    def __getitem__(self, order: _Order) -> PairBatch | BadImageError | StoreError:
        """A batch, or why there is none: torch would bury the message of what is raised in a process's traceback."""
        try:
            return self.make(order)
        except (BadImageError, StoreError) as error:
            return error

    def make(self, order: _Order) -> PairBatch:
        """Read, decode, size and augment the images of a batch. Raises BadImageError if so configured."""
        bad: list[str] = []
        queries = _blank(len(order.query_ids), self.data.visible_query_size)
        references = _blank(len(order.query_ids), self.data.reference_size)
        valid = torch.zeros(len(order.query_ids), dtype=torch.bool)
        pairs = zip(
            _filled(order.query_ids),
            order.queries,
            read_images(order.queries),
            read_images(order.references),
            strict=True,
        )
        for slot, file, query, reference in pairs:
            if isinstance(query, BadImageError) or isinstance(reference, BadImageError):
                self._note([query, reference], bad)
                continue
            queries[slot], references[slot] = self._pair(file, query, reference, order.epoch)
            valid[slot] = True
        gallery = self._gallery(order, bad)
        return PairBatch(
            order.number,
            order.query_ids,
            queries,
            references,
            valid,
            tuple(bad),
            gallery[0],
            order.gallery_ids,
            gallery[1],
        )

    def _gallery(self, order: _Order, bad: list[str]) -> tuple[Tensor | None, Tensor | None]:
        if order.gallery_ids is None:
            return None, None
        images = _blank(len(order.gallery_ids), self.data.reference_size)
        valid = torch.zeros(len(order.gallery_ids), dtype=torch.bool)
        found = zip(
            _filled(order.gallery_ids), order.gallery, read_images(order.gallery), strict=True
        )
        for slot, file, image in found:
            if isinstance(image, BadImageError):
                self._note([image], bad)
                continue
            rng = np.random.default_rng((self.seed, order.epoch, file.id, _GALLERY_STREAM))
            images[slot] = augment_reference(
                image, self.augment, rng, partial(fit_reference, data=self.data)
            )
            valid[slot] = True
        return images, valid

    def _note(self, found: list[Tensor | BadImageError], bad: list[str]) -> None:
        """The first fault joins `bad`, where bad images are skipped; else it is raised."""
        fault = next(image for image in found if isinstance(image, BadImageError))
        if self.data.on_bad_image == "fail":
            raise fault
        bad.append(str(fault))

    def _pair(
        self, file: ImageFile, query: Tensor, reference: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, epoch, file.id, _AUGMENT_STREAM))
        fits = (
            partial(fit_query, data=self.data, heading=file.heading),
            partial(fit_reference, data=self.data),
        )
        panorama, tile = augment_pair(query, reference, self.augment, rng, fits)
        return crop_field_of_view(
            panorama, self.data, rng
        ), tile  # after a roll, which needs the whole circle


def _blank(count: int, size: tuple[int, int]) -> Tensor:
    return torch.zeros(count, 3, *size, dtype=torch.uint8)


def _filled(ids: Ints) -> list[int]:
    slots: list[int] = np.flatnonzero(ids >= 0).tolist()
    return slots


class _Source(Protocol):
    """What loads the batches of orders, in their order."""

    def load(self, orders: Iterator[_Order]) -> Iterator[PairBatch]: ...

    def num_ready(self) -> int: ...

    def close(self) -> None: ...


class _Threads:
    """Threads of this process; decoding, sizing and reading leave the interpreter to others."""

    def __init__(self, maker: _BatchMaker) -> None:
        self._maker = maker
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="pair-loader")
        self._waiting: deque[Future[PairBatch]] = deque()

    def load(self, orders: Iterator[_Order]) -> Iterator[PairBatch]:
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

    def num_ready(self) -> int:
        return sum(future.done() for future in self._waiting)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Orders(Sampler[_Order]):
    """What the processes are told to load next: torch takes its items, in the parent, as batches are taken."""

    def __init__(self) -> None:
        self.next: Iterator[_Order] = iter(())

    def __iter__(self) -> Iterator[_Order]:
        return self.next


class _Processes:
    """Processes of their own, spawned: forking one that runs Ray, or has threads, may deadlock."""

    def __init__(self, maker: _BatchMaker, num_processes: int) -> None:
        self._orders = _Orders()
        self._loads = 0
        self._loader: DataLoader[PairBatch | BadImageError | StoreError] = DataLoader(
            maker,
            sampler=self._orders,
            batch_size=None,  # an item is a batch
            collate_fn=_as_it_is,
            num_workers=num_processes,
            multiprocessing_context="spawn",
            persistent_workers=True,
            generator=torch.Generator(),  # the process's own would be advanced, and dropout with it
        )
        # Not in the main thread: there torch sets a handler that, when a process dies, raises out of any line
        with ThreadPoolExecutor(1) as pool:
            self._items: Any = pool.submit(iter, self._loader).result()

    def load(self, orders: Iterator[_Order]) -> Iterator[PairBatch]:
        self._loads += 1
        load, self._orders.next = self._loads, orders
        items = self._guard(iter, self._loader)  # discards what an unfinished load has asked for
        while (item := self._guard(next, items, None)) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            if load != self._loads:
                raise RuntimeError("a load was continued after the next had begun")

    def _guard(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that waits for processes. Raises DeadProcessError when one has died."""
        try:
            return function(*args)
        except (RuntimeError, OSError, EOFError) as error:  # which of them depends on the moment
            ending = wait([worker.sentinel for worker in self._items._workers], timeout=1)
            dead = next(
                (worker for worker in self._items._workers if worker.sentinel in ending), None
            )
            if dead is None:
                raise
            dead.join()
            raise DeadProcessError(
                f"loader process {dead.pid} died with exit code {dead.exitcode}; if memory (-9) or /dev/shm (-7) ran"
                " out, lower train.loader_processes"
            ) from error

    def num_ready(self) -> int:
        """Those in the queue to this process, and those taken out of it before their turn; torch has no public way."""
        early = sum(
            len(task) == 2 for task in self._items._task_info.values()
        )  # the process, and its answer
        return early + int(self._items._data_queue.qsize())

    def close(self) -> None:
        self._items._shutdown_workers()  # torch has no public way


def _as_it_is(item: Any) -> Any:
    return item
