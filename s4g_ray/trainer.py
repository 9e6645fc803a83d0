"""Ray Train: the loop that a worker runs, the driver's end of it, checkpoints.

The driver decides which plan an epoch uses and posts it, once; every rank asks the mailbox for the plan of
its next epoch and waits for it. Ranks never poll and never decide.
"""

from __future__ import annotations

import io
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.config import FailureConfig
from torch.nn.parallel import DistributedDataParallel

from s4g_ray import storage
from s4g_ray.config import RunConfig, TrainConfig
from s4g_ray.dataset import open_dataset
from s4g_ray.encoder import WEIGHTS, Encoder, Numerics, encode_weights, load_encoder
from s4g_ray.errors import BadImageError, InputError, RunError
from s4g_ray.images import PairBatch, PairLoader
from s4g_ray.loss import symmetric_info_nce
from s4g_ray.mailbox import Mailbox, Message
from s4g_ray.sampler import load_gallery, load_plan

STATE = "training_state.pt"
_ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (BadImageError, InputError, RunError)}


def save_checkpoint(uri: str, encoder: Encoder, state: dict[str, Any] | None, *, epoch: int, step: int) -> None:
    """Publish weights, training state (of optimiser and scaler; none before training) and checkpoint.json."""
    weights = encode_weights(encoder)
    parts = [storage.write_part(uri, WEIGHTS, weights, 1)]
    if state is not None:
        buffer = io.BytesIO()
        torch.save({**state, "epoch": epoch, "step": step}, buffer)
        parts.append(storage.write_part(uri, STATE, buffer.getvalue(), 1))
    info = {"epoch": epoch, "step": step, "weights_sha256": parts[0].sha256, "dim": encoder.dim}
    parts.append(storage.write_part(uri, "checkpoint.json", json.dumps(info).encode(), 1))
    storage.publish(uri, "checkpoint", parts, info=info)


def _load_training_state(uri: str) -> dict[str, Any] | None:
    part = storage.open_published(uri, "checkpoint").part(STATE)
    if part is None:
        return None
    return torch.load(io.BytesIO(storage.read_part(uri, part)), weights_only=True)  # type: ignore[no-any-return]


def learning_rate(cfg: TrainConfig, position: float) -> float:
    """The learning rate at a position in epochs: linear warm-up, then half a cosine down to 0."""
    if position < cfg.warmup_epochs:
        return cfg.learning_rate * position / cfg.warmup_epochs
    rest = max(cfg.epochs - cfg.warmup_epochs, 1e-9)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * min((position - cfg.warmup_epochs) / rest, 1)))


@dataclass
class _Worker:
    """A rank: its encoder, optimiser and loader, and where it stands."""

    config: RunConfig
    numerics: Numerics
    mailbox: Any
    encoder: Encoder
    ddp: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # idle but for fp16
    loader: PairLoader
    device: torch.device
    epoch: int
    step: int
    steps_skipped: int = 0  # of this epoch

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def post(self, kind: str, **content: Any) -> None:
        ray.get(self.mailbox.post.remote({"kind": kind, **content}))


def train_worker(job: dict[str, Any]) -> None:
    """What a Ray Train worker runs: epochs of the plans that the driver posts, from a checkpoint on."""
    try:
        worker = _build_worker(job)
        while worker.epoch < worker.config.train.epochs:
            plan = ray.get(worker.mailbox.plan.remote(worker.epoch + 1))
            if plan is None:
                return
            worker.epoch += 1
            _train_epoch(worker, plan)
    except tuple(_ERRORS.values()) as error:
        failure = {"kind": "failed", "error": type(error).__name__, "message": str(error)}
        ray.get(job["mailbox"].post.remote(failure))
        raise


def _build_worker(job: dict[str, Any]) -> _Worker:
    config, checkpoint = job["config"], job["checkpoint"]
    cfg = config.train
    torch.set_num_threads(cfg.threads_per_worker)
    device = get_device()
    torch.manual_seed(config.seed)
    encoder = load_encoder(config.model, checkpoint).to(device)
    job["numerics"].prepare(encoder)
    ddp = DistributedDataParallel(encoder, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    half = job["numerics"].precision == "fp16"
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=half)
    state = _load_training_state(checkpoint)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    dataset = open_dataset(config.data.uri)
    split, sampling = config.data.train_split, config.sampling
    reference_splits = {split, *(sampling.gallery_splits if sampling.gallery_negatives else ())}
    loader = PairLoader(
        dataset.table("queries", [split]), dataset.table("references", sorted(reference_splits)), config.data,
        config.augment, seed=config.seed, num_threads=cfg.loader_threads,
    )  # fmt: skip
    epoch, step = (state["epoch"], state["step"]) if state else (0, 0)
    return _Worker(
        config, job["numerics"], job["mailbox"], encoder, ddp, optimizer, scaler, loader, device, epoch, step
    )


def rank_slots(num_slots: int, num_workers: int, rank: int) -> slice:
    """The slots of a global batch, or of its gallery, that a rank takes."""
    share = num_slots // num_workers
    return slice(rank * share, (rank + 1) * share)


def _train_epoch(worker: _Worker, plan: str) -> None:
    """One epoch of a plan; rank 0 publishes the checkpoint and reports."""
    cfg, seed = worker.config.train, worker.config.seed
    query_ids, reference_ids = load_plan(plan)
    mine = rank_slots(cfg.batch_size, cfg.num_workers, worker.rank)
    torch.manual_seed(int(np.random.default_rng((seed, worker.epoch, worker.rank)).integers(2**62)))
    worker.ddp.train()
    worker.steps_skipped = 0
    meter = _Meter(worker, len(query_ids))
    gallery_ids = _gallery_share(worker, plan)
    batches = worker.loader.load(
        query_ids[:, mine], reference_ids[:, mine], epoch=worker.epoch, gallery_ids=gallery_ids
    )
    for batch in meter.time_loading(batches):
        position = worker.epoch - 1 + (batch.number + 0.5) / len(query_ids)
        for group in worker.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, position)
        loss = _train_step(worker, batch)
        worker.step += 1
        meter.add(batch, loss)
    meter.stop()
    if not all(parameter.isfinite().all() for parameter in worker.encoder.parameters()):
        raise RunError(f"the weights are not finite after step {worker.step} (epoch {worker.epoch}, its last batch)")
    if worker.rank == 0:
        uri = storage.join(worker.config.run_dir, f"checkpoints/epoch={worker.epoch:04d}")
        state = {"optimizer": worker.optimizer.state_dict(), "scaler": worker.scaler.state_dict()}
        save_checkpoint(uri, worker.encoder, state, epoch=worker.epoch, step=worker.step)
    if worker.device.type == "cuda":
        torch.cuda.empty_cache()  # embedding actors may share the GPU
    dist.barrier()
    meter.report_epoch()


def _gallery_share(worker: _Worker, plan: str) -> NDArray[np.int64] | None:
    """The gallery references of a plan that this rank takes, [B, e]; None where the run has none."""
    num, num_workers = worker.config.sampling.gallery_negatives, worker.config.train.num_workers
    return load_gallery(plan)[:, rank_slots(num, num_workers, worker.rank)] if num else None


def _train_step(worker: _Worker, batch: PairBatch) -> float:
    """Forward, backward, clip by value, step; the share of this rank in the global loss.

    In fp16 the scaler leaves out the steps of gradients that are not finite, on all ranks alike, and is lowered.
    """
    cfg = worker.config.train
    queries = worker.numerics.layout(batch.queries.to(worker.device))
    tiles = batch.references if batch.gallery is None else torch.cat([batch.references, batch.gallery])
    references = worker.numerics.layout(tiles.to(worker.device))
    with worker.numerics.autocast(worker.device):
        embedded_q, embedded_tiles, scale = worker.ddp(queries, references)
    embedded_r, embedded_g = embedded_tiles[: len(queries)], embedded_tiles[len(queries) :]
    loss = symmetric_info_nce(
        embedded_q,
        embedded_r,
        scale,
        label_smoothing=cfg.label_smoothing,
        valid=batch.valid.to(worker.device),
        extra_references=None if batch.gallery is None else embedded_g,
        extra_valid=None if batch.gallery_valid is None else batch.gallery_valid.to(worker.device),
    )
    value = loss.item()
    if not math.isfinite(value):
        raise RunError(_describe_non_finite(worker, batch, value, torch.cat([embedded_q, embedded_tiles])))
    worker.optimizer.zero_grad(set_to_none=True)
    worker.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    worker.scaler.unscale_(worker.optimizer)
    torch.nn.utils.clip_grad_value_(worker.encoder.parameters(), cfg.clip_value)
    worker.scaler.step(worker.optimizer)
    scale = worker.scaler.get_scale()
    worker.scaler.update()
    worker.steps_skipped += worker.scaler.get_scale() < scale
    return value


def _describe_non_finite(worker: _Worker, batch: PairBatch, value: float, embedded: torch.Tensor) -> str:
    """embedded[b + b + e, D]: queries, their references, gallery references."""
    bad = torch.nonzero(~embedded.isfinite().all(dim=1)).flatten().cpu().numpy()
    pairs = len(batch.query_ids)
    found = {"query ids": batch.query_ids[bad[bad < 2 * pairs] % pairs]}
    if batch.gallery_ids is not None:
        found["gallery reference ids"] = batch.gallery_ids[bad[bad >= 2 * pairs] - 2 * pairs]
    shown = [f"{name} {np.unique(ids)[:5].tolist()}" for name, ids in found.items() if len(ids)]
    where = f"step {worker.step + 1} (epoch {worker.epoch}, batch {batch.number} of its plan)"
    embeddings = f"; non-finite embeddings for {' and '.join(shown)}" if shown else ""
    remedy = "start a new run with a lower train.learning_rate or train.precision=fp32"
    return f"the loss is {value} at {where}{embeddings}; {remedy}"


class _Meter:
    """Means over a rank's steps, reduced over ranks when they are reported."""

    def __init__(self, worker: _Worker, num_batches: int) -> None:
        self.worker, self.num_batches = worker, num_batches
        self.started = time.perf_counter()
        self.load_s = self.seconds = 0.0
        self.losses: list[float] = []
        self.logged = 0
        self.masked = self.gallery_masked = 0

    def time_loading(self, batches: Iterator[PairBatch]) -> Iterator[PairBatch]:
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.load_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def add(self, batch: PairBatch, loss: float) -> None:
        self.losses.append(loss)
        if batch.bad_images:
            self.masked += int((~batch.valid).sum())
            self.gallery_masked += batch.gallery_masked
            self.worker.post("bad_images", reasons=list(batch.bad_images))
        done = len(self.losses)
        if done % self.worker.config.train.log_every_steps == 0 or done == self.num_batches:
            content = self._state(self._mean(self.losses[self.logged :]))
            self.logged = done
            if self.worker.rank == 0:
                self.worker.post("step", done=done, total=self.num_batches, **content)

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self.started

    def report_epoch(self) -> None:
        load_s, masked = self._mean([self.load_s]), {"pairs_masked": self._sum(self.masked)}
        if self.worker.config.sampling.gallery_negatives:
            masked["gallery_masked"] = self._sum(self.gallery_masked)
        content = self._state(self._mean(self.losses))
        if self.worker.rank == 0:
            pairs = len(self.losses) * self.worker.config.train.batch_size
            self.worker.post(
                "epoch", **content, pairs_per_s=pairs / self.seconds, **masked, load_s=load_s,
                step_s=self.seconds - load_s, steps_skipped=self.worker.steps_skipped,
            )  # fmt: skip

    def _state(self, loss: float) -> dict[str, float]:
        return {
            "epoch": self.worker.epoch,
            "step": self.worker.step,
            "loss": loss,
            "learning_rate": float(self.worker.optimizer.param_groups[0]["lr"]),
            "temperature": float((-self.worker.encoder.logit_scale.detach()).exp().item()),
        }

    def _sum(self, count: int) -> int:
        """Of all ranks."""
        return round(self._mean([count]) * dist.get_world_size())

    def _mean(self, values: list[Any]) -> float:
        mean = torch.tensor(float(np.mean(values)) if values else 0.0, device=self.worker.device)
        dist.all_reduce(mean)
        return float(mean.item()) / dist.get_world_size()


class Training:
    """Ray Train's fit, in a thread of the driver, and the driver's end of the mailbox."""

    def __init__(self, config: RunConfig, checkpoint: str, numerics: Numerics) -> None:
        self._scratch = storage.join(config.run_dir, ".ray_train")  # Ray wants one; our checkpoints lie elsewhere
        self.mailbox: Any = ray.remote(Mailbox).options(num_cpus=0).remote()
        job = {"config": config, "checkpoint": checkpoint, "numerics": numerics, "mailbox": self.mailbox}
        self._trainer = TorchTrainer(
            train_worker,
            train_loop_config=job,
            torch_config=TorchConfig(backend="nccl" if config.train.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.train.num_workers,
                use_gpu=config.train.use_gpu,
                resources_per_worker={
                    "CPU": config.train.cpus_per_worker,
                    "GPU": config.train.gpus,
                },
            ),
            run_config=ray.train.RunConfig(
                name=f"s4g-{os.getpid()}-{time.time_ns()}",  # unique: Ray resumes a name that it knows
                storage_path=self._scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # handed to the driver's main thread, which raises it
            self._error = error

    def post_plan(self, epoch: int, uri: str) -> None:
        """Give every rank the plan of an epoch."""
        ray.get(self.mailbox.put_plan.remote(epoch, uri))

    def messages(self) -> Iterator[Message]:
        """What the workers post, for ever. Raises what a worker failed with, and RunError when one died."""
        while True:
            alive = self._thread.is_alive()
            taken = ray.get(self.mailbox.take.remote(1.0))
            for message in taken:
                if message["kind"] == "failed":
                    raise _ERRORS[message["error"]](message["message"])
                yield message
            if not taken and not alive:
                raise RunError(f"training ended early: {_last_line(self._error)}") from self._error

    def close(self, timeout_s: float = 30.0) -> None:
        """Let the workers end, and wait for them."""
        ray.get(self.mailbox.stop.remote())
        self._thread.join(timeout_s)
        storage.remove(self._scratch)


def _last_line(error: BaseException | None) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if error is not None and lines else "the workers stopped without an error"


def stamp_of(config: RunConfig, encoder: Encoder, checkpoint: str, fingerprint: str) -> storage.Stamp:
    """The stamp of what is computed from a checkpoint."""
    info = storage.open_published(checkpoint, "checkpoint").info
    return storage.Stamp(
        step=info["step"],
        weights_sha256=info["weights_sha256"],
        preprocessing=encoder.preprocessing(config.data),
        dataset=fingerprint,
        dim=info["dim"],
        dtype=config.embedding.dtype,
    )
