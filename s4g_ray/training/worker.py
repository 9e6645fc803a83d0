"""Train epochs of batch plans on a Ray Train worker, from the newest checkpoint on.

The driver decides which plan an epoch uses and posts it, once. Every rank asks the mailbox for the
plan of its next epoch and waits for it. Ranks neither poll nor decide: rank 0 learns from the
mailbox that the run is to stop, and passes it to all ranks together with the loss of the same step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.pair_loader import PairBatch, PairLoader
from s4g_ray.data.tables.batch_plan import (
    load_gallery_share,
    load_plan_share,
    load_record,
)
from s4g_ray.data.tables.node_cache import open_image_tables
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
from s4g_ray.training.epoch_totals import EpochTotals
from s4g_ray.training.step import LearningRateClock, StepResult, TrainingStep, step_seed

FAILURES: dict[str, type[Exception]] = {
    error.__name__: error for error in (BadImageError, InputError, RunError, StoreError, WriteError)
}
# an epoch's lines of metrics.jsonl that its checkpoints keep: a driver that dies may not have
# written them
LINES_KEPT = 200
_VOTES = {"stop": 1, "save": 2}


def train_worker(job: dict[str, Any]) -> None:
    """Train until the last epoch, or until the driver stops the run.

    Posts an error that the user can fix, and stops all ranks.
    """
    mailbox = job["mailbox"]
    try:
        start = agree_on_start(job["config"].run_dir, mailbox)
        if start is None:
            return
        with _open_loader(job["config"]) as loader:
            _Worker(job, start, loader).run()
    except tuple(FAILURES.values()) as error:
        message = {"kind": "failed", "error": type(error).__name__, "message": str(error)}
        ray.get(mailbox.post.remote(message))
        ray.get(mailbox.stop.remote())
        # raise, or the other ranks would wait for this one; Ray starts all again, and all then stop
        raise


def agree_on_start(run: str, mailbox: Any) -> Checkpoint | None:
    """Return the newest checkpoint that rank 0 finds, the same on all ranks.

    None when the run is stopped. Raises RunError when the run has no published checkpoint.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0 and not ray.get(mailbox.is_stopped.remote()):
        found = [newest_checkpoint(run) or "none"]
    dist.broadcast_object_list(found, device=get_device())
    if found[0] == "none":
        raise RunError(f"{run} holds no published checkpoint; remove it and start again")
    return found[0]  # type: ignore[no-any-return]


def _open_loader(config: RunConfig) -> PairLoader:
    split = config.data.train_split
    reference_splits = {split}
    if config.sampling.gallery_negatives:
        reference_splits.update(config.sampling.gallery_splits)
    tables = open_image_tables(
        config.data.uri,
        {"queries": [split], "references": sorted(reference_splits)},
        config.data.cache_dir,
    )
    return PairLoader(
        tables["queries"],
        tables["references"],
        config.data,
        config.augment,
        seed=config.seed,
        num_processes=config.train.loader_processes,
    )


class _Worker:
    """A rank: its encoder, optimiser and loader, and its position in the run."""

    def __init__(self, job: dict[str, Any], start: Checkpoint, loader: PairLoader) -> None:
        config: RunConfig = job["config"]
        torch.set_num_threads(config.train.threads_per_worker)
        self.config = config
        self.mailbox = job["mailbox"]
        self.loader = loader
        self.device = get_device()
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        self.stop_call = self.mailbox.wait_for_stop.remote()
        self.num_ahead = 0.0  # batches loaded ahead, mean of the ranks
        self.encoder: Encoder = load_encoder(config.model, start.uri)
        self.training_step = TrainingStep(
            self.encoder, Numerics(**job["numerics"]), config.train, self.device
        )
        self.start = start
        self._restore(start)
        if self.rank == 0:
            self._post(
                "started",
                workers=self.num_ranks,
                epoch=self.epoch,
                step=self.step,
                batch=self.batch,
            )

    def _restore(self, start: Checkpoint) -> None:
        """Set the position, totals and optimiser state of a checkpoint."""
        state = start.training_state()
        if state is not None:
            self.training_step.load(state)
        self.epoch = start.epoch  # finished epochs
        self.step = start.step  # finished steps of all epochs
        self.batch = start.batch  # finished batches of the epoch in progress
        self.clock = LearningRateClock(float(start.info.get("schedule_lag", 0.0)))
        self.totals = EpochTotals()
        self.lines: deque[dict[str, float]] = deque(maxlen=LINES_KEPT)
        if start.batch:  # a checkpoint within an epoch
            self.totals = EpochTotals(**start.info.get("totals", {}))
            self.lines.extend(start.info.get("lines", ()))

    def _post(self, kind: str, **content: Any) -> None:
        """Post a message to the driver."""
        ray.get(self.mailbox.post.remote({"kind": kind, **content}))

    def run(self) -> None:
        """Train epochs until the last, or until the driver stops the run."""
        while self.epoch < self.config.train.epochs:
            asked = time.time()
            plan = ray.get(self.mailbox.wait_for_plan.remote(self.epoch + 1))
            if plan is None:
                self._post_stopped()
                return
            if self.rank == 0:
                self._post("waited", epoch=self.epoch + 1, since=asked, until=time.time())
            if self.batch == 0:
                self.totals.wait_s += time.time() - asked
            if self._train_epoch(plan):
                return

    def _post_stopped(self) -> None:
        if self.rank == 0:
            self._post("stopped", step=self.step, checkpoint=self.start.uri)

    def _train_epoch(self, plan: str) -> bool:
        """Train on the batches of a plan that are left; return whether the run is to stop."""
        ids = self._read_plan(plan)
        num_batches = len(ids["query_ids"])
        every_steps = self.config.checkpoint.every_steps
        vote = 0
        for batch, load_s in self._load_batches(ids):
            began = time.perf_counter()
            result = self._run_step(batch, num_batches)
            vote = self.reduce_metrics(result, batch, load_s, began)
            is_last = self.batch == num_batches
            self._log_step(num_batches, is_due=vote != 0 or is_last)
            if is_last:
                continue
            is_due = every_steps is not None and self.step % every_steps == 0
            if vote == _VOTES["save"] or is_due:
                self._save_within(plan)
            if vote:
                self._post_stopped()
                return True
        self._finish_epoch(plan)
        return vote != 0

    def _read_plan(self, plan: str) -> dict[str, Any]:
        """Return this rank's ids of a plan, as arguments of PairLoader.load.

        Raises RunError when the checkpoint within an epoch was trained on another plan.
        """
        if self.batch:
            plan_sha256 = files.fingerprint(files.read_bytes(plan))
            if plan_sha256 != self.start.info["plan_sha256"]:
                raise RunError(
                    f"{plan} is not the plan that {self.start.uri} was trained on; remove"
                    f" {self.start.uri} and resume"
                )
        query_ids, reference_ids = load_plan_share(plan, self.num_ranks, self.rank)
        found: dict[str, Any] = {"query_ids": query_ids, "reference_ids": reference_ids}
        if self.config.sampling.gallery_negatives:
            found["gallery_ids"] = load_gallery_share(plan, self.num_ranks, self.rank)
        return found

    def _load_batches(self, ids: dict[str, Any]) -> Iterator[tuple[PairBatch, float]]:
        """Yield the epoch's batches that are left, each with the seconds of waiting for it."""
        batches = self.loader.load(**ids, epoch=self.epoch + 1, first=self.batch)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch, time.perf_counter() - before

    def _run_step(self, batch: PairBatch, num_batches: int) -> StepResult:
        epoch = self.epoch + 1
        result = self.training_step.step(
            batch,
            seed=step_seed(self.config.seed, epoch, batch.number, self.rank),
            position=self.clock.position(epoch, batch.number, num_batches),
            where=f"step {self.step + 1} (epoch {epoch}, batch {batch.number} of its plan)",
        )
        self.step += 1
        self.batch += 1
        self.clock = self.clock.after(result, num_batches)
        return result

    def reduce_metrics(
        self, result: StepResult, batch: PairBatch, load_s: float, began: float
    ) -> int:
        """Add a step's metrics to the totals of all ranks, in one small reduction.

        Returns the vote that rank 0 passes to all ranks: 0, or how to stop (_VOTES).
        """
        if batch.bad_images:
            self._post("bad_images", reasons=list(batch.bad_images))
        own_vote = 0
        if self.rank == 0 and ray.wait([self.stop_call], timeout=0)[0]:
            own_vote = _VOTES[ray.get(self.stop_call)]
        values = [
            float(result.loss),
            load_s,
            batch.pairs_masked,
            batch.gallery_masked,
            self.loader.num_ready,
            own_vote,
        ]
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        loss, sum_load_s, pairs_masked, gallery_masked, num_ready, vote = sums.tolist()
        self.num_ahead = num_ready / self.num_ranks
        totals = self.totals
        totals.batches += 1
        totals.loss += loss / self.num_ranks
        totals.load_s += sum_load_s / self.num_ranks
        totals.masked += round(pairs_masked)
        totals.gallery_masked += round(gallery_masked)
        totals.skipped += int(result.skipped)
        totals.seconds += time.perf_counter() - began + sum_load_s / self.num_ranks
        return int(vote)

    def _log_step(self, num_batches: int, *, is_due: bool) -> None:
        """Post the mean loss of the steps since the last line, if a line is due.

        Lines are due every train.log_every_steps batches, and whenever is_due.
        """
        if not is_due and self.batch % self.config.train.log_every_steps != 0:
            return
        loss = self.totals.take_mean_loss()
        if self.rank == 0:
            line = {**self._describe_state(self.epoch + 1), "loss": loss}
            self.lines.append(line)
            self._post("step", done=self.batch, total=num_batches, ahead=self.num_ahead, **line)

    def _describe_state(self, epoch: int) -> dict[str, float]:
        return {
            "epoch": epoch,
            "step": self.step,
            "learning_rate": float(self.training_step.optimizer.param_groups[0]["lr"]),
            "temperature": float((-self.encoder.logit_scale.detach()).exp().item()),
        }

    def _save_within(self, plan: str) -> None:
        """Publish a checkpoint within an epoch, on rank 0."""
        if self.rank == 0:
            self._save(
                step_uri(self.config.run_dir, self.step),
                plan,
                batch=self.batch,
                totals=asdict(self.totals),
            )
            self._post("checkpoint", step=self.step)

    def _save(self, uri: str, plan: str, **info: Any) -> None:
        """Publish a checkpoint at `uri`; info: more entries of its checkpoint.json."""
        started = time.perf_counter()
        save_checkpoint(
            uri,
            self.encoder,
            self.training_step.state(),
            epoch=self.epoch,
            step=self.step,
            schedule_lag=self.clock.lag,
            workers=self.num_ranks,
            random_draws="keyed by (seed, epoch, batch, rank)",
            lines=list(self.lines),
            plan=plan.removeprefix(self.config.run_dir).lstrip("/"),
            plan_sha256=files.fingerprint(files.read_bytes(plan)),
            graph=load_record(plan).get("graph"),
            **info,
        )
        self.totals.seconds += time.perf_counter() - started
        self.start = Checkpoint.read(uri)

    def _finish_epoch(self, plan: str) -> None:
        """Publish the epoch's checkpoint with its metrics, then post the metrics; both on rank 0.

        Raises RunError when the weights are not finite.
        """
        if not all(parameter.isfinite().all() for parameter in self.encoder.parameters()):
            raise RunError(
                f"the weights are not finite after step {self.step} (epoch {self.epoch + 1}, its"
                " last batch)"
            )
        self.epoch += 1
        self.batch = 0
        if self.rank == 0:
            cfg = self.config
            has_gallery = cfg.sampling.gallery_negatives > 0
            record = {
                **self._describe_state(self.epoch),
                **self.totals.record(cfg.train.batch_size, has_gallery),
                "workers": self.num_ranks,
            }
            self._save(epoch_uri(cfg.run_dir, self.epoch), plan, record=record)
            self._post("epoch", **record)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # embedding actors may share the GPU
        self.totals = EpochTotals()
        self.lines.clear()
