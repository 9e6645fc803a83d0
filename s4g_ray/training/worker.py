"""What a Ray Train worker runs: epochs of the plans that the driver posts, from the newest checkpoint on.

The driver decides which plan an epoch uses and posts it, once; every rank asks the mailbox for the
plan of its next epoch and waits for it. Ranks never poll and never decide: the word to stop goes
through rank 0 to all, with the loss of the same step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import open_dataset
from s4g_ray.data.pair_loader import PairBatch, PairLoader
from s4g_ray.data.tables.batch_plan import load_gallery, load_plan, load_record
from s4g_ray.encoder.checkpoint import (
    Checkpoint,
    epoch_uri,
    load_encoder,
    newest_checkpoint,
    save_checkpoint,
    step_uri,
)
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import BadImageError, InputError, RunError, StoreError, WriteError
from s4g_ray.storage import files
from s4g_ray.training.step import LearningRateClock, StepResult, TrainingStep, step_seed

FAILURES: dict[str, type[Exception]] = {
    e.__name__: e for e in (BadImageError, InputError, RunError, StoreError, WriteError)
}
LINES_KEPT = 200  # of metrics.jsonl about an epoch, in its checkpoints: a driver that dies may not have written them
_VOTES = {"stop": 1, "save": 2}


def train_worker(job: dict[str, Any]) -> None:
    """Train until the last epoch, or the word to stop. What a user can act on is posted, and stops all ranks."""
    mailbox = job["mailbox"]
    try:
        start = agree_on_start(job["config"].run_dir, mailbox)
        if start is None:
            return
        with _open_loader(job["config"]) as loader:
            _Worker(job, start, loader).run()
    except tuple(FAILURES.values()) as error:
        ray.get(
            mailbox.post.remote(
                {"kind": "failed", "error": type(error).__name__, "message": str(error)}
            )
        )
        ray.get(mailbox.stop.remote())
        raise  # or the other ranks would wait for this one; started again, all hear the word to stop


def agree_on_start(run: str, mailbox: Any) -> Checkpoint | None:
    """The newest checkpoint as rank 0 finds it, the same on all ranks; None when the run is stopped."""
    found: list[Any] = [None]
    if dist.get_rank() == 0 and not ray.get(mailbox.is_stopped.remote()):
        found = [newest_checkpoint(run) or "none"]
    dist.broadcast_object_list(found, device=get_device())
    if found[0] == "none":
        raise RunError(f"{run} holds no published checkpoint; remove it and start again")
    return found[0]  # type: ignore[no-any-return]


def _open_loader(config: RunConfig) -> PairLoader:
    dataset, split, sampling = (
        open_dataset(config.data.uri),
        config.data.train_split,
        config.sampling,
    )
    reference_splits = {split, *(sampling.gallery_splits if sampling.gallery_negatives else ())}
    return PairLoader(
        dataset.table("queries", [split]),
        dataset.table("references", sorted(reference_splits)),
        config.data,
        config.augment,
        seed=config.seed,
        num_processes=config.train.loader_processes,
    )


def rank_share(slots: Ints, num_workers: int, rank: int) -> Ints:
    """slots[B, n] of global batches -> those of a rank, [B, ceil(n / W)]; -1 where W does not divide n, at the end."""
    share = -(-slots.shape[1] // num_workers)
    own = slots[:, rank * share : (rank + 1) * share]
    return np.pad(own, ((0, 0), (0, share - own.shape[1])), constant_values=-1)


@dataclass
class EpochTotals:
    """What an epoch has summed up so far, over all ranks; kept in checkpoints within it."""

    batches: int = 0
    loss: float = 0.0
    masked: int = 0
    gallery_masked: int = 0
    skipped: int = 0
    load_s: float = 0.0  # mean of the ranks
    seconds: float = 0.0
    wait_s: float = 0.0  # for the plan
    logged: int = 0  # batches that a line of metrics.jsonl is about
    logged_loss: float = 0.0  # of them

    def record(self, batch_size: int, gallery: bool) -> dict[str, float]:
        """The metrics of a finished epoch."""
        masked = {
            "pairs_masked": self.masked,
            **({"gallery_masked": self.gallery_masked} if gallery else {}),
        }
        return {
            "loss": self.loss / max(self.batches, 1),
            "pairs_per_s": self.batches * batch_size / self.seconds if self.seconds else 0.0,
            **masked,
            "load_s": self.load_s,
            "load_wait": self.load_s / self.seconds if self.seconds else 0.0,
            "step_s": self.seconds - self.load_s,
            "steps_skipped": self.skipped,
            "wait_s": self.wait_s,
            "wait_share": self.wait_s / max(self.wait_s + self.seconds, 1e-9),
        }


class _Worker:
    """A rank: its encoder, optimiser and loader, and where it stands."""

    def __init__(self, job: dict[str, Any], start: Checkpoint, loader: PairLoader) -> None:
        config: RunConfig = job["config"]
        cfg, self.config, self.mailbox = config.train, config, job["mailbox"]
        torch.set_num_threads(cfg.threads_per_worker)
        self.device = get_device()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.stopped = self.mailbox.stopped.remote()
        self.ahead = 0.0  # batches loaded ahead, mean of the ranks
        self.loader = loader
        self.encoder: Encoder = load_encoder(config.model, start.uri)
        self.stepper = TrainingStep(self.encoder, Numerics(**job["numerics"]), cfg, self.device)
        if (state := start.training_state()) is not None:
            self.stepper.load(state)
        self.epoch, self.step, self.batch = start.epoch, start.step, start.batch  # finished
        self.schedule = LearningRateClock(float(start.info.get("schedule_lag", 0.0)))
        self.totals = EpochTotals(**(start.info.get("totals", {}) if start.batch else {}))
        self.start = start
        self.lines = deque(start.info.get("lines", ()) if start.batch else (), maxlen=LINES_KEPT)
        if self.rank == 0:
            self.post(
                "started", workers=self.size, epoch=self.epoch, step=self.step, batch=self.batch
            )

    def post(self, kind: str, **content: Any) -> None:
        """Tell the driver."""
        ray.get(self.mailbox.post.remote({"kind": kind, **content}))

    def run(self) -> None:
        """Epochs until the last, or until the word to stop."""
        while self.epoch < self.config.train.epochs:
            asked = time.time()
            plan = ray.get(self.mailbox.plan.remote(self.epoch + 1))
            if plan is None:
                if self.rank == 0:
                    self.post("stopped", step=self.step, checkpoint=self.start.uri)
                return
            if self.rank == 0:
                self.post("waited", epoch=self.epoch + 1, since=asked, until=time.time())
            self.totals.wait_s += time.time() - asked if self.batch == 0 else 0.0
            if self._train_epoch(plan):
                return

    def _train_epoch(self, plan: str) -> bool:
        """The rest of an epoch's plan; whether the word to stop came."""
        ids = self._read_plan(plan)
        num_batches, every = len(ids["query_ids"]), self.config.checkpoint.every_steps
        vote = 0
        for batch, load_s in self._batches(ids):
            began = time.perf_counter()
            outcome = self._take_step(batch, num_batches)
            vote = self.reduce_metrics(outcome, batch, load_s, began)
            done = self.batch == num_batches
            self._log_step(num_batches, vote != 0 or done)
            if not done and (vote == _VOTES["save"] or (every and self.step % every == 0)):
                self._save_within(plan)
            if vote and not done:
                if self.rank == 0:
                    self.post("stopped", step=self.step, checkpoint=self.start.uri)
                return True
        self._finish_epoch(plan)
        return vote != 0

    def _read_plan(self, plan: str) -> dict[str, Any]:
        """The loader's arguments: what this rank loads of a plan, from where it stands on."""
        if (
            self.batch
            and files.fingerprint(files.read_bytes(plan)) != self.start.info["plan_sha256"]
        ):
            raise RunError(
                f"{plan} is not the plan that {self.start.uri} was trained on; remove that and resume"
            )
        query_ids, reference_ids = (
            rank_share(ids, self.size, self.rank) for ids in load_plan(plan)
        )
        found: dict[str, Any] = {"query_ids": query_ids, "reference_ids": reference_ids}
        if self.config.sampling.gallery_negatives:
            found["gallery_ids"] = rank_share(load_gallery(plan), self.size, self.rank)
        return found

    def _batches(self, ids: dict[str, Any]) -> Iterator[tuple[PairBatch, float]]:
        """The batches of an epoch, each with the seconds that it was waited for."""
        batches = self.loader.load(**ids, epoch=self.epoch + 1, first=self.batch)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch, time.perf_counter() - before

    def _take_step(self, batch: PairBatch, num_batches: int) -> StepResult:
        epoch = self.epoch + 1
        outcome = self.stepper.step(
            batch,
            seed=step_seed(self.config.seed, epoch, batch.number, self.rank),
            position=self.schedule.position(epoch, batch.number, num_batches),
            where=f"step {self.step + 1} (epoch {epoch}, batch {batch.number} of its plan)",
        )
        self.step += 1
        self.batch += 1
        self.schedule = self.schedule.after(outcome, num_batches)
        return outcome

    def reduce_metrics(
        self, outcome: StepResult, batch: PairBatch, load_s: float, began: float
    ) -> int:
        """Add a step to the totals of all ranks, in one small reduction; the word to stop, if rank 0 has heard it."""
        if batch.bad_images:
            self.post("bad_images", reasons=list(batch.bad_images))
        vote = 0
        if self.rank == 0 and ray.wait([self.stopped], timeout=0)[0]:
            vote = _VOTES[ray.get(self.stopped)]
        values = [
            float(outcome.loss),
            load_s,
            batch.pairs_masked,
            batch.gallery_masked,
            self.loader.num_ready,
            vote,
        ]
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared)
        loss, load_s, masked, gallery_masked, ahead, vote_all = shared.tolist()
        self.ahead = ahead / self.size
        totals = self.totals
        totals.batches += 1
        totals.loss += loss / self.size
        totals.load_s += load_s / self.size
        totals.masked += round(masked)
        totals.gallery_masked += round(gallery_masked)
        totals.skipped += outcome.skipped
        totals.seconds += time.perf_counter() - began + load_s / self.size
        return int(vote_all)

    def _log_step(self, num_batches: int, last: bool) -> None:
        """Post the mean loss of the steps since the last line, when one is due."""
        if not (last or self.batch % self.config.train.log_every_steps == 0):
            return
        totals = self.totals
        mean = (totals.loss - totals.logged_loss) / (totals.batches - totals.logged)
        totals.logged, totals.logged_loss = totals.batches, totals.loss
        if self.rank == 0:
            self.lines.append({**self._state(self.epoch + 1), "loss": mean})
            self.post(
                "step", done=self.batch, total=num_batches, ahead=self.ahead, **self.lines[-1]
            )

    def _state(self, epoch: int) -> dict[str, float]:
        return {
            "epoch": epoch,
            "step": self.step,
            "learning_rate": float(self.stepper.optimizer.param_groups[0]["lr"]),
            "temperature": float((-self.encoder.logit_scale.detach()).exp().item()),
        }

    def _save_within(self, plan: str) -> None:
        """Rank 0 publishes where training stands in an epoch."""
        if self.rank == 0:
            self._save(
                step_uri(self.config.run_dir, self.step),
                plan,
                batch=self.batch,
                totals=asdict(self.totals),
            )
            self.post("checkpoint", step=self.step)

    def _save(self, uri: str, plan: str, **info: Any) -> None:
        started = time.perf_counter()
        made_of = {
            "random_draws": "keyed by (seed, epoch, batch, rank)",
            "lines": list(self.lines),
            "plan": plan.removeprefix(self.config.run_dir).lstrip("/"),
            "plan_sha256": files.fingerprint(files.read_bytes(plan)),
            "graph": load_record(plan).get("graph"),
        }
        save_checkpoint(
            uri,
            self.encoder,
            self.stepper.state(),
            epoch=self.epoch,
            step=self.step,
            schedule_lag=self.schedule.lag,
            workers=self.size,
            **made_of,
            **info,
        )
        self.totals.seconds += time.perf_counter() - started
        self.start = Checkpoint.read(uri)

    def _finish_epoch(self, plan: str) -> None:
        """Rank 0 publishes the checkpoint with the epoch's metrics, then reports them."""
        if not all(parameter.isfinite().all() for parameter in self.encoder.parameters()):
            raise RunError(
                f"the weights are not finite after step {self.step} (epoch {self.epoch + 1}, its last batch)"
            )
        self.epoch, self.batch = self.epoch + 1, 0
        cfg = self.config
        if self.rank == 0:
            record = self.totals.record(cfg.train.batch_size, cfg.sampling.gallery_negatives > 0)
            record = {**self._state(self.epoch), **record, "workers": self.size}
            self._save(epoch_uri(cfg.run_dir, self.epoch), plan, record=record)
            self.post("epoch", **record)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # embedding actors may share the GPU
        self.totals = EpochTotals()
        self.lines.clear()
