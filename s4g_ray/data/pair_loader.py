"""Load batches of pairs ahead of the training step, by threads or by processes.

A pair's augmentation is drawn from (seed, epoch, query id), and that of a reference without a query
from its own id, so it is the same in any process or thread. Loader processes hold neither plans nor
image tables: each batch is sent to them as the few rows that it needs, so they always load batches
of the current plan.

With on_device, images are only read, decoded and resized here; the batch carries the draws, and
PairBatch.augment applies them, in the process that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from s4g_ray.arrays import Ints
from s4g_ray.config.data_schema import AugmentConfig, DataConfig, Size
from s4g_ray.data.batches.augmentation import augment_pair, augment_reference
from s4g_ray.data.batches.augmentation_draws import (
    BatchDraws,
    ImageDraws,
    add_field_of_view,
    draw_pair,
    draw_reference,
)
from s4g_ray.data.batches.batch_sources import BatchSource, ProcessSource, ThreadSource
from s4g_ray.data.batches.device_augmentation import augment_batch
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.images import (
    ImageFile,
    crop_field_of_view,
    draw_field_of_view,
    fit_query,
    fit_reference,
    list_image_files,
    read_images,
)
from s4g_ray.errors import BadImageError, StoreError

NUM_THREADS = 2  # where there are no loader processes
# Each separates one random stream of augmentation from others of the same (seed, epoch).
_AUGMENT_STREAM = 0x617567
_GALLERY_STREAM = 0x676175  # of references without a query

_Item = tuple[Tensor, ImageDraws]  # an image, and what is left to do to it


@dataclass(frozen=True)
class PairBatch:
    """A rank's share of a global batch: uint8 [b, 3, H, W] for each view, valid[b] bool.

    gallery: references without a query, uint8 [e, 3, H, W], of gallery_ids[e], gallery_valid[e]
    bool; None where the plan has none. Draws: what augment() is to do to the images of each view;
    None where nothing is left to do.
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
    query_draws: BatchDraws | None = None
    reference_draws: BatchDraws | None = None
    gallery_draws: BatchDraws | None = None
    # pairs and gallery images that could not be decoded, where `valid` has left the CPU: counting
    # there would wait for the device
    masked: tuple[int, int] | None = None

    @property
    def pairs_masked(self) -> int:
        """Count the pairs that could not be decoded."""
        if self.masked is not None:
            return self.masked[0]
        return int((self.query_ids >= 0).sum() - self.valid.sum())

    @property
    def gallery_masked(self) -> int:
        """Count the gallery images that could not be decoded."""
        if self.masked is not None:
            return self.masked[1]
        if self.gallery_ids is None or self.gallery_valid is None:
            return 0
        return int((self.gallery_ids >= 0).sum() - self.gallery_valid.sum())

    def pin(self) -> Self:
        """Return the batch in page-locked memory, from which copies to a GPU run by themselves."""
        return self._move(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Self:
        """Return the batch with all tensors on a device.

        From page-locked memory to a GPU, it returns before the copies are done.
        """
        return self._move(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def augment(self) -> Self:
        """Apply the draws to the images, on the device where they are; see augment_batch.

        Returns the batch itself if it has no draws.
        """
        if self.query_draws is None or self.reference_draws is None:
            return self
        gallery = self.gallery
        if gallery is not None and self.gallery_draws is not None:
            gallery = augment_batch(gallery, self.gallery_draws)
        return replace(
            self,
            queries=augment_batch(self.queries, self.query_draws),
            references=augment_batch(self.references, self.reference_draws),
            gallery=gallery,
            query_draws=None,
            reference_draws=None,
            gallery_draws=None,
        )

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the images until a CUDA stream has used it."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def without_images(self) -> Self:
        """Return the batch with ids, flags and counts alone."""
        none = torch.empty(0)  # a slice would keep the memory of all
        return replace(self, queries=none, references=none, gallery=None)

    def _move(self, change: Callable[[Tensor], Tensor]) -> Self:
        moved: dict[str, Tensor | BatchDraws] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = change(value)
            elif isinstance(value, BatchDraws):
                moved[field.name] = value.move(change)
        masked = (self.pairs_masked, self.gallery_masked)
        return replace(self, masked=masked, **moved)  # type: ignore[arg-type]


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
    Every number gives the same batches. on_device: batches are not augmented yet, but carry their
    draws (AugmentConfig.is_on_device decides).
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
        on_device: bool = False,
    ) -> None:
        self.queries = queries
        self.references = references
        maker = _BatchMaker(data, augment, seed, on_device)
        self._source: BatchSource[_BatchOrder, PairBatch]
        if num_processes:
            self._source = ProcessSource(maker, num_processes)
        else:
            self._source = ThreadSource(maker.make, NUM_THREADS)

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
    on_device: bool

    def __getitem__(self, order: _BatchOrder) -> PairBatch | BadImageError | StoreError:
        """Make a batch, or return its error.

        If it were raised, torch would hide its message in the traceback of a process.
        """
        try:
            return self.make(order)
        except (BadImageError, StoreError) as error:
            return error

    def make(self, order: _BatchOrder) -> PairBatch:
        """Read, decode and resize the images of a batch, and augment them or draw how to.

        Raises BadImageError if data.on_bad_image is `fail`.
        """
        bad: list[str] = []
        queries = _View(len(order.query_ids), self._query_size, self.on_device)
        references = _View(len(order.query_ids), self.data.reference_size, self.on_device)
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
                query_item, reference_item = self._make_pair(file, query, reference, order.epoch)
                queries.put(slot, query_item)
                references.put(slot, reference_item)
                valid[slot] = True
        gallery, gallery_valid = self._make_gallery(order, bad)
        return PairBatch(
            order.number,
            order.query_ids,
            queries.images,
            references.images,
            valid,
            tuple(bad),
            None if gallery is None else gallery.images,
            order.gallery_ids,
            gallery_valid,
            queries.pack_draws(self.data.visible_query_size[1]),
            references.pack_draws(self.data.reference_size[1]),
            None if gallery is None else gallery.pack_draws(self.data.reference_size[1]),
        )

    @property
    def _query_size(self) -> Size:
        """Return the size of a loaded query: whole where it is still to be rolled and cropped."""
        return self.data.query_size if self.on_device else self.data.visible_query_size

    def _make_gallery(
        self, order: _BatchOrder, bad: list[str]
    ) -> tuple[_View | None, Tensor | None]:
        """Load the gallery [e] and gallery_valid[e]; None where the plan has no gallery."""
        if order.gallery_ids is None:
            return None, None
        gallery = _View(len(order.gallery_ids), self.data.reference_size, self.on_device)
        valid = torch.zeros(len(order.gallery_ids), dtype=torch.bool)
        slots = _find_filled_slots(order.gallery_ids)
        for slot, file, image in zip(slots, order.gallery, read_images(order.gallery), strict=True):
            if isinstance(image, BadImageError):
                self._record_bad_image(image, bad)
                continue
            rng = np.random.default_rng((self.seed, order.epoch, file.id, _GALLERY_STREAM))
            gallery.put(slot, self._make_reference(image, rng))
            valid[slot] = True
        return gallery, valid

    def _make_reference(self, image: Tensor, rng: np.random.Generator) -> _Item:
        fit = partial(fit_reference, data=self.data)
        if self.on_device:
            return fit(image), draw_reference(self.augment, rng, self.data.reference_size)
        return augment_reference(image, self.augment, rng, fit), {}

    def _record_bad_image(self, error: BadImageError, bad: list[str]) -> None:
        """Append the reason to `bad`. Raises the error if data.on_bad_image is `fail`."""
        if self.data.on_bad_image == "fail":
            raise error
        bad.append(str(error))

    def _make_pair(
        self, file: ImageFile, query: Tensor, reference: Tensor, epoch: int
    ) -> tuple[_Item, _Item]:
        rng = np.random.default_rng((self.seed, epoch, file.id, _AUGMENT_STREAM))
        fits = (
            partial(fit_query, data=self.data, heading=file.heading),
            partial(fit_reference, data=self.data),
        )
        if self.on_device:
            sizes = (self.data.query_size, self.data.reference_size)
            query_draws, reference_draws = draw_pair(self.augment, rng, *sizes)
            add_field_of_view(query_draws, *draw_field_of_view(self.data, rng))
            return (fits[0](query), query_draws), (fits[1](reference), reference_draws)
        panorama, tile = augment_pair(query, reference, self.augment, rng, fits)
        # Cropped last: rolling with the tile needs the whole circle.
        return (crop_field_of_view(panorama, self.data, rng), {}), (tile, {})


class _View:
    """The images uint8 [n, 3, H, W] of one view of a batch, blank at first, and their draws."""

    def __init__(self, count: int, size: Size, on_device: bool) -> None:
        self._draws: list[ImageDraws] | None = None
        if on_device:
            # In the layout of decoded pixels: copying them into another takes as long as decoding.
            blank = torch.zeros(count, *size, 3, dtype=torch.uint8)
            self.images = blank.permute(0, 3, 1, 2)
            self._draws = [{} for _ in range(count)]
        else:
            self.images = torch.zeros(count, 3, *size, dtype=torch.uint8)

    def put(self, slot: int, item: _Item) -> None:
        image, draws = item
        self.images[slot] = image
        if self._draws is not None:
            self._draws[slot] = draws

    def pack_draws(self, width: int) -> BatchDraws | None:
        """Pack the draws for the device; width: the columns that are kept at last."""
        return None if self._draws is None else BatchDraws.from_images(self._draws, width)


def _find_filled_slots(ids: Ints) -> list[int]:
    slots: list[int] = np.flatnonzero(ids >= 0).tolist()
    return slots
