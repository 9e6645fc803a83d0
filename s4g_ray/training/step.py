"""A rank's optimisation steps: precision, the gradient of the global batch, clipping, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from s4g_ray.config.schema import TrainConfig
from s4g_ray.data.pair_loader import PairBatch
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import RunError
from s4g_ray.training.gradient_cache import Chunk, backward_in_chunks, divide
from s4g_ray.training.loss import symmetric_info_nce

INITIAL_GRADIENT_SCALE = 2.0**10  # of fp16, as published
LEAST_GRADIENT_SCALE = 2.0**-20  # half of it is reached by some 30 skipped steps on end


def learning_rate(cfg: TrainConfig, position: float) -> float:
    """The learning rate at a position in epochs: linear warm-up, then half a cosine down to 0."""
    if position < cfg.warmup_epochs:
        return cfg.learning_rate * position / cfg.warmup_epochs
    rest = max(cfg.epochs - cfg.warmup_epochs, 1e-9)
    return (
        cfg.learning_rate
        * 0.5
        * (1 + math.cos(math.pi * min((position - cfg.warmup_epochs) / rest, 1)))
    )


@dataclass(frozen=True)
class StepResult:
    """What came of a step."""

    loss: float  # this rank's share of the global loss, which is the mean over ranks
    skipped: bool  # fp16: the gradients were not finite and the weights are as they were; on all ranks alike


@dataclass(frozen=True)
class LearningRateClock:
    """Where a run stands on the schedule of its learning rate, which steps that were skipped do not advance."""

    lag: float = 0.0  # epochs that skipped steps took

    def position(self, epoch: int, batch: int, num_batches: int) -> float:
        """In epochs, of the middle of a batch (0, 1, ...) of an epoch (1, 2, ...) that has so many."""
        return epoch - 1 + (batch + 0.5) / num_batches - self.lag

    def after(self, outcome: StepResult, num_batches: int) -> LearningRateClock:
        """The schedule of the next step."""
        return LearningRateClock(self.lag + 1 / num_batches) if outcome.skipped else self


def step_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """What a step's random draws depend on."""
    return int(np.random.default_rng((seed, epoch, batch, rank)).integers(2**62))


def seed_draws(seed: int, chunk: int) -> None:
    """Seed torch for the forward pass of a chunk of a step, so that it draws the same whenever it is done again."""
    torch.manual_seed(int(np.random.default_rng((seed, chunk)).integers(2**62)))


class TrainingStep:
    """The encoder with its optimiser; DDP where a process group is initialised.

    Dropout and the like are seeded anew for each step: the state is all that must be kept to go on.
    """

    def __init__(
        self, encoder: Encoder, numerics: Numerics, cfg: TrainConfig, device: torch.device
    ) -> None:
        self.encoder = encoder.to(device).train()
        numerics.prepare(encoder)
        self.numerics, self.cfg, self.device = numerics, cfg, device
        self.model: nn.Module = encoder
        self._no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
        if dist.is_initialized():
            self.model = ddp = DistributedDataParallel(encoder, broadcast_buffers=False)
            self._no_sync = ddp.no_sync
        self.optimizer = torch.optim.AdamW(
            encoder.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay
        )
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=INITIAL_GRADIENT_SCALE, enabled=numerics.precision == "fp16"
        )

    def step(self, batch: PairBatch, *, seed: int, position: float, where: str) -> StepResult:
        """One step on this rank's share of a global batch, at a position in epochs; clips gradients by value.

        The gradient is that of the whole global batch, whatever train.micro_batch_size, and is reduced over ranks
        once. Raises RunError, which says `where`, when the loss is not finite, and when fp16 finds no scale at
        which gradients are.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, position)
        self.optimizer.zero_grad(set_to_none=True)
        num_gallery = 0 if batch.gallery is None else len(batch.gallery)
        loss = backward_in_chunks(
            divide(len(batch.queries), num_gallery, self.cfg.micro_batch_size),
            lambda chunk: self._embed(batch, chunk, seed),
            lambda rows, scale: self._backward(batch, rows, scale, where),
            self._no_sync,
        )
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_value_(self.encoder.parameters(), self.cfg.clip_value)
        self.scaler.step(self.optimizer)
        return StepResult(loss, self._update_scale(where))

    def state(self) -> dict[str, Any]:
        """What training goes on from, beside the weights: the tensors themselves, which the next step changes."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state() gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _embed(self, batch: PairBatch, chunk: Chunk, seed: int) -> tuple[Tensor, Tensor]:
        """rows[n, D] of the chunk's queries, references and gallery references, and the scale."""
        seed_draws(seed, chunk.number)
        tiles = batch.references[chunk.pairs]
        if batch.gallery is not None:
            tiles = torch.cat([tiles, batch.gallery[chunk.gallery]])
        queries, tiles = (
            self.numerics.layout(i.to(self.device)) for i in (batch.queries[chunk.pairs], tiles)
        )
        with self.numerics.autocast(self.device):
            embedded_queries, embedded_tiles, scale = self.model(queries, tiles)
        return torch.cat([embedded_queries, embedded_tiles]), scale

    def _backward(self, batch: PairBatch, rows: Tensor, scale: Tensor, where: str) -> float:
        """The loss of rows[2 b + e, D], and its backward pass."""
        pairs, gallery, valid = len(batch.queries), batch.gallery, batch.gallery_valid
        loss = symmetric_info_nce(
            rows[:pairs],
            rows[pairs : 2 * pairs],
            scale,
            label_smoothing=self.cfg.label_smoothing,
            valid=batch.valid.to(self.device),
            extra_references=None if gallery is None else rows[2 * pairs :],
            extra_valid=None if valid is None else valid.to(self.device),
        )
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(describe_non_finite(batch, value, rows, where))
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return value

    def _update_scale(self, where: str) -> bool:
        """Lower the scale after gradients that were not finite, raise it now and then; whether it was lowered."""
        before = self.scaler.get_scale()
        self.scaler.update()
        after = self.scaler.get_scale()
        if after < LEAST_GRADIENT_SCALE:
            raise RunError(
                f"the gradients are not finite in fp16 at {where}, though scaled by {after:g} only, the least being"
                f" {LEAST_GRADIENT_SCALE:g}; start a new run with a lower train.learning_rate or train.precision=fp32"
            )
        return after < before


def describe_non_finite(batch: PairBatch, value: float, rows: Tensor, where: str) -> str:
    """What to say of a loss over rows[2 b + e, D]: embeddings of queries, their references, gallery references."""
    bad = torch.nonzero(~rows.isfinite().all(dim=1)).flatten().cpu().numpy()
    pairs = len(batch.query_ids)
    found = {"query ids": batch.query_ids[bad[bad < 2 * pairs] % pairs]}
    if batch.gallery_ids is not None:
        found["gallery reference ids"] = batch.gallery_ids[bad[bad >= 2 * pairs] - 2 * pairs]
    known = {
        name: np.unique(ids[ids >= 0]) for name, ids in found.items()
    }  # an empty slot's id is -1
    shown = [f"{name} {ids[:5].tolist()}" for name, ids in known.items() if len(ids)]
    embeddings = f"; non-finite embeddings for {' and '.join(shown)}" if shown else ""
    remedy = "start a new run with a lower train.learning_rate or train.precision=fp32"
    return f"the loss is {value} at {where}{embeddings}; {remedy}"
