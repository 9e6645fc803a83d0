"""Small encoders and batches for tests of training steps, and an oracle of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from s4g_ray.config.training_schema import TrainConfig
from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.data.sphere import METRES_A_DEGREE
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training.loss import share_targets, symmetric_info_nce
from s4g_ray.training.step import TrainingStep, seed_draws

PAIRS = 8
GALLERY = 6
SEED = 11
SOFT_LABELS = 0.7
CPU = torch.device("cpu")
SQUARE = (32, 32)
WIDE = (32, 48)
Gradients = dict[str, Tensor]


def encoder(
    name: str = "test_convnext",
    *,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Encoder:
    """Make an encoder with random weights such that each layer counts.

    (timm starts ConvNeXt's blocks with a scale of a millionth.)
    """
    torch.manual_seed(5)
    backbone = timm.create_model(name, num_classes=0, drop_path_rate=drop_path)
    backbone.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Encoder(backbone, 0.07, freeze_batch_norm=True).to(dtype).train()


def images(count: int, size: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def draw_ground(num_pairs: int, num_gallery: int) -> tuple[Tensor, Tensor]:
    """Draw squares of ground that overlap: [num_pairs, 6] and [num_gallery, 3]."""
    rng = np.random.default_rng(6)
    metre = 1 / METRES_A_DEGREE
    tiles = np.empty((num_pairs + num_gallery, 3))
    tiles[:, :2] = rng.uniform(0, 150 * metre, (len(tiles), 2))
    tiles[:, 2] = rng.choice([60.0, 90.0], len(tiles))
    queries = tiles[:num_pairs].copy()
    queries[:, :2] += rng.uniform(-20 * metre, 20 * metre, (num_pairs, 2))
    pairs = np.concatenate([queries, tiles[:num_pairs]], axis=1)
    return torch.from_numpy(pairs), torch.from_numpy(tiles[num_pairs:].copy())


def make_soft_batch() -> PairBatch:
    """Make a batch whose tiles overlap, for train.soft_labels."""
    ground, gallery_ground = draw_ground(PAIRS, GALLERY)
    batch = make_batch(gallery=GALLERY, masked=[2], masked_gallery=[1])
    return replace(batch, ground=ground, gallery_ground=gallery_ground)


def make_batch(
    *,
    size: tuple[int, int] = SQUARE,
    gallery: int = 0,
    masked: Sequence[int] = (),
    masked_gallery: Sequence[int] = (),
) -> PairBatch:
    """Make a global batch of PAIRS pairs and so many gallery references.

    size: of references. masked: pairs that are not valid. masked_gallery: gallery references that
    are not valid.
    """
    batch = PairBatch(
        7,
        np.arange(30, 30 + PAIRS),
        images(PAIRS, SQUARE, 1),
        images(PAIRS, size, 2),
        torch.tensor([i not in masked for i in range(PAIRS)]),
        (),
    )
    if not gallery:
        return batch
    return replace(
        batch,
        gallery=images(gallery, size, 3),
        gallery_ids=np.arange(70, 70 + gallery),
        gallery_valid=torch.tensor([i not in masked_gallery for i in range(gallery)]),
    )


BATCHES: dict[str, Callable[[], PairBatch]] = {
    "pairs": make_batch,
    "sizes": lambda: make_batch(size=WIDE),
    "gallery": lambda: make_batch(gallery=GALLERY, masked_gallery=[0, 4]),
    "masks": lambda: make_batch(size=WIDE, gallery=2, masked=[1, 6, 7], masked_gallery=[1]),
    "soft": make_soft_batch,
}


def config(micro: int | None = None, **train: Any) -> TrainConfig:
    settings = {"epochs": 3, **train}
    return TrainConfig(batch_size=PAIRS, num_workers=1, micro_batch_size=micro, **settings)


def soft_labels_for(batch: PairBatch) -> float:
    """Return the value of train.soft_labels for a batch: 0 where it has no squares of ground."""
    return 0.0 if batch.ground is None else SOFT_LABELS


def step(
    model: Encoder,
    batch: PairBatch,
    micro: int | None = None,
    numerics: Numerics | None = None,
    **train: Any,
) -> tuple[float, Gradients]:
    """Run a step; return its loss and gradient."""
    cfg = config(micro, soft_labels=soft_labels_for(batch), **train)
    training_step = TrainingStep(model, numerics or Numerics(), cfg, CPU)
    result = training_step.step(batch, seed=SEED, position=0.5)
    assert not result.is_skipped
    return result.loss.item(), gradients(model)


def overflow(model: Encoder) -> RemovableHandle:
    """Make the gradient of the scale infinite in every step, until the handle is removed."""
    return model.logit_scale.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call,no-any-return]


def gradients(module: Encoder) -> Gradients:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def oracle(
    model: Encoder, batch: PairBatch, chunks: Sequence[slice] = (slice(None),)
) -> tuple[float, Gradients]:
    """Compute the loss and the gradient of a batch in one graph of autograd.

    chunks: pairs that are embedded together, after seeding.
    """
    queries = []
    references = []
    gallery = []
    for number, chunk in enumerate(chunks):
        seed_draws(SEED, number)
        count = len(batch.queries[chunk])
        tiles = batch.references[chunk]
        if batch.gallery is not None:
            tiles = torch.cat([tiles, batch.gallery.tensor_split(len(chunks))[number]])
        q, t, scale = model(batch.queries[chunk], tiles)
        queries.append(q)
        references.append(t[:count])
        gallery.append(t[count:])
    shared = None
    if batch.ground is not None:
        shared = share_targets(
            batch.ground, batch.gallery_ground, strength=SOFT_LABELS, min_share=0.1
        )
    loss = symmetric_info_nce(
        torch.cat(queries),
        torch.cat(references),
        scale,
        label_smoothing=0.1,
        valid=batch.valid,
        extra_references=None if batch.gallery is None else torch.cat(gallery),
        extra_valid=batch.gallery_valid,
        shared=shared,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), gradients(model)


def assert_close(
    found: tuple[float, Gradients], wanted: tuple[float, Gradients], tolerance: float = 1e-10
) -> None:
    """Compare loss and gradients; tolerance: relative to each tensor's greatest absolute value."""
    found_loss, found_gradients = found
    wanted_loss, wanted_gradients = wanted
    assert found_loss == pytest.approx(wanted_loss, rel=tolerance)
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        assert gradient.abs().max() > 0, name
        error = (found_gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"
