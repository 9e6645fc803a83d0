"""Run a rank's optimisation steps.

A step computes the gradient of the global batch in the chosen precision, clips it, and updates the
weights at the learning rate of its position in the run. The host does not wait for the device:
results stay there until they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from s4g_ray.config.training_schema import TrainConfig
from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.data.tables.batch_plan import load_size
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics, allow_tf32
from s4g_ray.encoder.training_state import restore_state
from s4g_ray.training.gradient_cache import Chunk, backward_in_chunks, divide_batch
from s4g_ray.training.loss import SharedTargets, share_targets, symmetric_info_nce
from s4g_ray.training.optimizer import Optimizer, WeightAverage, trained_parameters

INITIAL_GRADIENT_SCALE = 2.0**10  # of fp16, as published


@dataclass(frozen=True)
class StepResult:
    """The results of a step, on the device; reading one waits for the step."""

    loss: Tensor  # this rank's share of the global loss, which is the mean over ranks
    # the gradients were not finite, so the weights did not change; the same on all ranks
    is_skipped: Tensor
    # rows[2 b + e] bool: which embeddings of queries, references and gallery are not finite
    bad_rows: Tensor


@dataclass(frozen=True)
class StepClock:
    """Tells the position in epochs of the steps that train on a plan.

    batches: of the plan, or, as published, of all its pairs, those that it leaves out included.
    """

    batches: int
    is_published: bool = False

    @classmethod
    def from_plan(cls, uri: str, *, is_published: bool) -> Self:
        """Read the size of a saved plan."""
        size = load_size(uri)
        if is_published:
            return cls(-(-size.num_pairs // size.batch_size), is_published)
        return cls(size.num_batches)

    def position(self, num_epochs: int, batch: int, num_steps: int) -> float:
        """Return the position of a batch, given the finished epochs and steps of the run.

        It is the batch's middle. As published it is its start, and steps are counted through all
        epochs: the first step of a run has a learning rate of 0, and the last does not reach 0
        again where plans leave pairs out.
        """
        if self.is_published:
            return num_steps / self.batches
        return num_epochs + (batch + 0.5) / self.batches


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
        self,
        encoder: Encoder,
        numerics: Numerics,
        cfg: TrainConfig,
        device: torch.device,
        *,
        decay_norms: bool = False,
    ) -> None:
        self.encoder = encoder.to(device).train()
        numerics.prepare(encoder)
        self.numerics = numerics
        self.cfg = cfg
        self.device = device
        allow_tf32(cfg, device)
        self.model: nn.Module = encoder
        self._no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
        if dist.is_initialized():
            ddp = _wrap(encoder, cfg)
            self.model = ddp
            self._no_sync = ddp.no_sync
        self.optimizer = Optimizer(encoder, cfg, decay_norms=decay_norms)
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=INITIAL_GRADIENT_SCALE, enabled=numerics.precision == "fp16"
        )
        self.average: WeightAverage | None = None
        if cfg.ema_decay is not None:
            self.average = WeightAverage(encoder, cfg.ema_decay)

    def step(self, batch: PairBatch, *, seed: int, position: float) -> StepResult:
        """Run one step on this rank's share of a global batch, whose tensors lie on the device.

        The gradient is that of the whole global batch for any train.micro_batch_size. It is reduced
        over ranks once, and clipped. seed: of the step's random draws. position: in epochs, for the
        learning rate.
        """
        self.optimizer.prepare(position)
        num_gallery = 0 if batch.gallery is None else len(batch.gallery)
        loss, bad_rows = backward_in_chunks(
            divide_batch(len(batch.queries), num_gallery, self.cfg.micro_batch_size),
            lambda chunk: self._embed(batch, chunk, seed),
            lambda rows, scale: self._backward(batch, rows, scale),
            self._no_sync,
        )
        self.scaler.unscale_(self.optimizer.adamw)
        is_skipped = self.optimizer.clip().isfinite().logical_not()
        self.optimizer.step(is_skipped)
        self.scaler.update()
        if self.cfg.max_logit_scale is not None:
            with torch.no_grad():
                self.encoder.logit_scale.clamp_(max=np.log(self.cfg.max_logit_scale))
        if self.average is not None:
            self.average.update()
        return StepResult(loss, is_skipped, bad_rows)

    def state(self) -> dict[str, Any]:
        """Return the state that training resumes from, beside the weights.

        The tensors are not copied: the next step changes them.
        """
        state = {"optimizer": self.optimizer.adamw.state_dict(), "scaler": self.scaler.state_dict()}
        if self.average is not None:  # the published weights are the average
            trained = trained_parameters(self.encoder)
            state["weights"] = {name: p.detach() for name, p in trained.items()}
        return state

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict to publish: averaged weights where train.ema_decay is set."""
        state: dict[str, Tensor] = self.encoder.state_dict()
        if self.average is not None:
            state.update(self.average.by_name())
        return state

    def load(self, state: dict[str, Any], source: str) -> None:
        """Resume from what state() returned; the encoder holds the published weights.

        source: the origin of the state, for messages. Raises RunError when it does not fit.
        """
        restore_state(state, self.optimizer.adamw, self.scaler, source)
        if "weights" in state:
            self.encoder.load_state_dict(state["weights"], strict=False)

    def _embed(self, batch: PairBatch, chunk: Chunk, seed: int) -> tuple[Tensor, Tensor]:
        """Return rows[n, D] of a chunk's queries, references and gallery, and the scale."""
        seed_draws(seed, chunk.number)
        tiles = batch.references[chunk.pairs]
        if batch.gallery is not None:
            tiles = torch.cat([tiles, batch.gallery[chunk.gallery]])
        queries = self.numerics.layout(batch.queries[chunk.pairs])
        tiles = self.numerics.layout(tiles)
        with self.numerics.autocast(self.device):
            embedded_queries, embedded_tiles, scale = self.model(queries, tiles)
        return torch.cat([embedded_queries, embedded_tiles]), scale

    def _backward(self, batch: PairBatch, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Run the backward pass of the loss of the batch's embeddings, rows[2 b + e, D].

        Returns the loss, and which rows are not finite.
        """
        num_pairs = len(batch.queries)
        gallery_rows = None
        if batch.gallery is not None:
            gallery_rows = rows[2 * num_pairs :]
        loss = symmetric_info_nce(
            rows[:num_pairs],
            rows[num_pairs : 2 * num_pairs],
            scale,
            label_smoothing=self.cfg.label_smoothing,
            valid=batch.valid,
            extra_references=gallery_rows,
            extra_valid=batch.gallery_valid,
            shared=self._share_targets(batch),
        )
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), rows.detach().isfinite().all(dim=1).logical_not()

    def _share_targets(self, batch: PairBatch) -> SharedTargets | None:
        """Return how targets are shared among tiles; None where they are not.

        Raises ValueError for a batch without squares of ground that soft labels need.
        """
        if not self.cfg.soft_labels:
            return None
        if batch.ground is None:
            raise ValueError(
                f"train.soft_labels={self.cfg.soft_labels:g}, but batch {batch.number} carries no"
                " squares of ground; load it with_ground"
            )
        return share_targets(
            batch.ground,
            batch.gallery_ground,
            strength=self.cfg.soft_labels,
            min_share=self.cfg.soft_label_min_share,
        )


def _wrap(encoder: Encoder, cfg: TrainConfig) -> DistributedDataParallel:
    """Wrap the encoder in DDP.

    The graph is static but with micro-batches, whose passes do not all reduce their gradients.
    """
    ddp = DistributedDataParallel(
        encoder,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=cfg.micro_batch_size is None,
    )
    if cfg.gradient_compression == "bf16":
        ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


def describe_non_finite(batch: PairBatch, bad_rows: Tensor) -> str:
    """Return the ids of the embeddings that are not finite; empty where all are.

    bad_rows[2 b + e] bool: of queries, their references and gallery references.
    """
    bad = torch.nonzero(bad_rows).flatten().cpu().numpy()
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
    return f"non-finite embeddings for {' and '.join(shown)}" if shown else ""
