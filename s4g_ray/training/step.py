"""Run a rank's optimisation steps.

A step computes the gradient of the global batch in the chosen precision, clips it, and updates the
weights at the learning rate of its position in the run.
"""

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

from s4g_ray.config.training_schema import TrainConfig
from s4g_ray.data.pair_loader import PairBatch
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import RunError
from s4g_ray.training.gradient_cache import Chunk, backward_in_chunks, divide_batch
from s4g_ray.training.loss import symmetric_info_nce

INITIAL_GRADIENT_SCALE = 2.0**10  # of fp16, as published
MIN_GRADIENT_SCALE = 2.0**-20  # about 30 skipped steps in a row lower the scale below it

NON_FINITE_REMEDY = "start a new run with a lower train.learning_rate or train.precision=fp32"


def learning_rate(cfg: TrainConfig, position: float) -> float:
    """Return the learning rate at a position in epochs.

    It rises linearly during the warm-up, then falls along half a cosine to 0.
    """
    if position < cfg.warmup_epochs:
        return cfg.learning_rate * position / cfg.warmup_epochs
    decay_epochs = max(cfg.epochs - cfg.warmup_epochs, 1e-9)
    progress = min((position - cfg.warmup_epochs) / decay_epochs, 1)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepResult:
    """The loss of a step, and whether the step was skipped."""

    loss: float  # this rank's share of the global loss, which is the mean over ranks
    # fp16: the gradients were not finite, so the weights did not change; the same on all ranks
    skipped: bool


@dataclass(frozen=True)
class LearningRateClock:
    """The position of a run in the schedule of its learning rate.

    Skipped steps do not advance it.
    """

    lag: float = 0.0  # length of all skipped steps, in epochs

    def position(self, epoch: int, batch: int, num_batches: int) -> float:
        """Return the position of the middle of a batch, in epochs.

        epoch: 1, 2, ...; batch: its number in the epoch, 0, 1, ..., of num_batches.
        """
        return epoch - 1 + (batch + 0.5) / num_batches - self.lag

    def after(self, result: StepResult, num_batches: int) -> LearningRateClock:
        """Return the clock of the next step, after a step of an epoch of num_batches."""
        if result.skipped:
            return LearningRateClock(self.lag + 1 / num_batches)
        return self


def step_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """Return the seed of a step's random draws."""
    return int(np.random.default_rng((seed, epoch, batch, rank)).integers(2**62))


def seed_draws(seed: int, chunk: int) -> None:
    """Seed torch for the forward pass of a step's chunk, so that a second pass draws the same."""
    torch.manual_seed(int(np.random.default_rng((seed, chunk)).integers(2**62)))


class TrainingStep:
    """The encoder and its optimiser; wrapped in DDP when a process group is initialised.

    Dropout and other random draws are seeded at each step, so training resumes from the
    weights and state() alone.
    """

    def __init__(
        self, encoder: Encoder, numerics: Numerics, cfg: TrainConfig, device: torch.device
    ) -> None:
        self.encoder = encoder.to(device).train()
        numerics.prepare(encoder)
        self.numerics = numerics
        self.cfg = cfg
        self.device = device
        self.model: nn.Module = encoder
        self._no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
        if dist.is_initialized():
            ddp = DistributedDataParallel(encoder, broadcast_buffers=False)
            self.model = ddp
            self._no_sync = ddp.no_sync
        self.optimizer = torch.optim.AdamW(
            encoder.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay
        )
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=INITIAL_GRADIENT_SCALE, enabled=numerics.precision == "fp16"
        )

    def step(self, batch: PairBatch, *, seed: int, position: float, where: str) -> StepResult:
        """Run one step on this rank's share of a global batch.

        The gradient is that of the whole global batch for any train.micro_batch_size. It is reduced
        over ranks once, and clipped by value. seed: of the step's random draws. position: in
        epochs, for the learning rate. where: the step's name in messages.

        Raises RunError when the loss is not finite, and when fp16 finds no scale at which the
        gradients are finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, position)
        self.optimizer.zero_grad(set_to_none=True)
        num_gallery = 0 if batch.gallery is None else len(batch.gallery)
        loss = backward_in_chunks(
            divide_batch(len(batch.queries), num_gallery, self.cfg.micro_batch_size),
            lambda chunk: self._embed(batch, chunk, seed),
            lambda rows, scale: self._backward(batch, rows, scale, where),
            self._no_sync,
        )
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_value_(self.encoder.parameters(), self.cfg.clip_value)
        self.scaler.step(self.optimizer)
        return StepResult(loss, self._update_scale(where))

    def state(self) -> dict[str, Any]:
        """Return the state that training resumes from, beside the weights.

        The tensors are not copied: the next step changes them.
        """
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from what state() returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _embed(self, batch: PairBatch, chunk: Chunk, seed: int) -> tuple[Tensor, Tensor]:
        """Return rows[n, D] of a chunk's queries, references and gallery, and the scale."""
        seed_draws(seed, chunk.number)
        tiles = batch.references[chunk.pairs]
        if batch.gallery is not None:
            tiles = torch.cat([tiles, batch.gallery[chunk.gallery]])
        queries = self.numerics.layout(batch.queries[chunk.pairs].to(self.device))
        tiles = self.numerics.layout(tiles.to(self.device))
        with self.numerics.autocast(self.device):
            embedded_queries, embedded_tiles, scale = self.model(queries, tiles)
        return torch.cat([embedded_queries, embedded_tiles]), scale

    def _backward(self, batch: PairBatch, rows: Tensor, scale: Tensor, where: str) -> float:
        """Return the loss of the batch's embeddings, rows[2 b + e, D], after its backward pass."""
        num_pairs = len(batch.queries)
        gallery_rows = None
        if batch.gallery is not None:
            gallery_rows = rows[2 * num_pairs :]
        gallery_valid = None
        if batch.gallery_valid is not None:
            gallery_valid = batch.gallery_valid.to(self.device)
        loss = symmetric_info_nce(
            rows[:num_pairs],
            rows[num_pairs : 2 * num_pairs],
            scale,
            label_smoothing=self.cfg.label_smoothing,
            valid=batch.valid.to(self.device),
            extra_references=gallery_rows,
            extra_valid=gallery_valid,
        )
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(describe_non_finite(batch, value, rows, where))
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return value

    def _update_scale(self, where: str) -> bool:
        """Update fp16's gradient scale; return whether it was lowered.

        The scaler lowers the scale after gradients that were not finite, and raises it now and
        then. Raises RunError when the scale falls below MIN_GRADIENT_SCALE.
        """
        before = self.scaler.get_scale()
        self.scaler.update()
        after = self.scaler.get_scale()
        if after < MIN_GRADIENT_SCALE:
            raise RunError(
                f"the gradients are not finite in fp16 at {where}, though scaled by {after:g} only,"
                f" the least being {MIN_GRADIENT_SCALE:g}; {NON_FINITE_REMEDY}"
            )
        return after < before


def describe_non_finite(batch: PairBatch, loss: float, rows: Tensor, where: str) -> str:
    """Return the message about a loss that is not finite, with the ids of the embeddings to blame.

    rows[2 b + e, D]: the embeddings of queries, their references and gallery references.
    """
    bad = torch.nonzero(~rows.isfinite().all(dim=1)).flatten().cpu().numpy()
    num_pairs = len(batch.query_ids)
    is_gallery = bad >= 2 * num_pairs
    ids = {"query ids": batch.query_ids[bad[~is_gallery] % num_pairs]}
    if batch.gallery_ids is not None:
        ids["gallery reference ids"] = batch.gallery_ids[bad[is_gallery] - 2 * num_pairs]
    shown = []
    for name, values in ids.items():
        known = np.unique(values[values >= 0])  # an empty slot's id is -1
        if len(known):
            shown.append(f"{name} {known[:5].tolist()}")
    embeddings = f"; non-finite embeddings for {' and '.join(shown)}" if shown else ""
    return f"the loss is {loss} at {where}{embeddings}; {NON_FINITE_REMEDY}"
