"""Small encoders and batches for tests of training steps, and their loss in one graph of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from s4g_ray.config.schema import TrainConfig
from s4g_ray.data.pair_loader import PairBatch
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training.loss import symmetric_info_nce
from s4g_ray.training.step import TrainingStep, seed_draws

PAIRS, GALLERY, SEED = 8, 6, 11
CPU = torch.device("cpu")
SAME, WIDE = (32, 32), (32, 48)
Gradients = dict[str, Tensor]


def encoder(
    name: str = "test_convnext",
    *,
    drop_path: float = 0.0,
    again: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Encoder:
    """Weights are drawn such that each layer counts (timm starts ConvNeXt's blocks at a millionth)."""
    torch.manual_seed(5)
    backbone = timm.create_model(name, num_classes=0, drop_path_rate=drop_path)
    backbone.set_grad_checkpointing(again)  # type: ignore[operator]
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Encoder(backbone, 0.07, freeze_batch_norm=True).to(dtype).train()


def images(count: int, size: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def batch_of(
    *,
    size: tuple[int, int] = SAME,
    gallery: int = 0,
    masked: Sequence[int] = (),
    masked_gallery: Sequence[int] = (),
) -> PairBatch:
    """A global batch; of the gallery, references beside it."""
    batch = PairBatch(
        7,
        np.arange(30, 30 + PAIRS),
        images(PAIRS, SAME, 1),
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
    "pairs": batch_of,
    "sizes": lambda: batch_of(size=WIDE),
    "gallery": lambda: batch_of(gallery=GALLERY, masked_gallery=[0, 4]),
    "masks": lambda: batch_of(size=WIDE, gallery=2, masked=[1, 6, 7], masked_gallery=[1]),
}


def config(micro: int | None = None, **train: Any) -> TrainConfig:
    return TrainConfig(
        batch_size=PAIRS, num_workers=1, micro_batch_size=micro, **{"epochs": 3, **train}
    )


def step(
    model: Encoder,
    batch: PairBatch,
    micro: int | None = None,
    numerics: Numerics | None = None,
    **train: Any,
) -> tuple[float, Gradients]:
    """The loss and the gradient of a step."""
    stepper = TrainingStep(model, numerics or Numerics(), config(micro, **train), CPU)
    outcome = stepper.step(batch, seed=SEED, position=0.5, where="here")
    assert not outcome.skipped
    return outcome.loss, gradients(model)


def overflow(model: Encoder) -> None:
    """Let no gradient of the scale be finite."""
    model.logit_scale.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]


def gradients(module: Encoder) -> Gradients:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def oracle(
    model: Encoder, batch: PairBatch, chunks: Sequence[slice] = (slice(None),)
) -> tuple[float, Gradients]:
    """Loss and gradient of a batch in one graph of autograd; chunks: pairs that are embedded by themselves, seeded."""
    queries, references, gallery = [], [], []
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
    loss = symmetric_info_nce(
        torch.cat(queries),
        torch.cat(references),
        scale,
        label_smoothing=0.1,
        valid=batch.valid,
        extra_references=None if batch.gallery is None else torch.cat(gallery),
        extra_valid=batch.gallery_valid,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), gradients(model)


def assert_close(
    found: tuple[float, Gradients], wanted: tuple[float, Gradients], tolerance: float = 1e-10
) -> None:
    """tolerance: of each tensor's greatest value."""
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert gradient.abs().max() > 0, name
        error = (found[1][name] - gradient).abs().max() / gradient.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"
