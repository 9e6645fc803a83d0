"""Define PairBatch: a rank's share of a global batch, and its way to the device that trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from s4g_ray.arrays import Ints
from s4g_ray.data.batches.augmentation_draws import BatchDraws
from s4g_ray.data.batches.device_augmentation import augment_batch


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
    # squares of ground, float64, where the loss needs them (train.soft_labels): [b, 6] of each
    # query and reference, [e, 3] of the gallery, as common_ground finds them
    ground: Tensor | None = None
    gallery_ground: Tensor | None = None

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
