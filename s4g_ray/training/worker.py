"""Train epochs of batch plans on a Ray Train worker, from the newest checkpoint on.

The driver decides which plan an epoch uses and posts it, once. Every rank asks the mailbox for the
plan of its next epoch and waits for it. Ranks neither poll nor decide: rank 0 learns from the
mailbox that the run is to stop, and passes it to all ranks when they meet. They meet where a line
is logged or a checkpoint is due; between two meetings the host does not wait for the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.data.image_table import View
from s4g_ray.data.pair_loader import PairLoader
from s4g_ray.data.tables.batch_plan import (
    load_gallery_share,
    load_plan_share,
    load_record,
)
from s4g_ray.data.tables.node_cache import open_image_tables
from s4g_ray.encoder.checkpoint import (
    STATE,
    Checkpoint,
    epoch_uri,
    load_encoder,
    newest_checkpoint,
    publish_checkpoint,
    step_uri,
)
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import RunError
from s4g_ray.storage import files
from s4g_ray.training.checkpoint_writer import CheckpointWriter
from s4g_ray.training.compilation import compile_encoder
from s4g_ray.training.failures import failure_of
from s4g_ray.training.metrics.epoch_totals import EpochTotals, StepWindow
from s4g_ray.training.metrics.instruments import (
    ForwardTimer,
    StepProfiler,
    count_batch_flops,
    describe_speed,
    find_slowest_rank,
    measure_gpu_memory,
)
from s4g_ray.training.metrics.skipped_steps import SkippedSteps
from s4g_ray.training.prefetch import DevicePrefetch
from s4g_ray.training.step import StepClock, TrainingStep, step_seed

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
        with _open_loader(job["config"]) as loader, CheckpointWriter() as writer:
            RankTraining(job, start, loader, writer).run()
    except Exception as error:
        failure = failure_of(error, job["config"])
        if failure is not None:
            message = {"kind": "failed", "error": type(failure).__name__, "message": str(failure)}
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
    wanted: Mapping[View, list[str]] = {"queries": [split], "references": sorted(reference_splits)}
    data = config.data
    tables = open_image_tables(data.uri, wanted, data.cache_dir, data.image_options)
    return PairLoader(
        tables["queries"],
        tables["references"],
        config.data,
        config.augmentation,
        seed=config.seed,
        num_processes=config.train.loader_processes,
        on_device=config.augmentation.is_on_device(get_device().type),
        with_ground=config.train.soft_labels > 0,
    )


class RankTraining:
    """A rank: its encoder, optimiser and loader, and its position in the run."""

    def __init__(
        self, job: dict[str, Any], start: Checkpoint, loader: PairLoader, writer: CheckpointWriter
    ) -> None:
        config: RunConfig = job["config"]
        torch.set_num_threads(config.train.threads_per_worker)
        self.config = config
        self.mailbox = job["mailbox"]
        self.loader = loader
        self.writer = writer
        self.device = get_device()
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        self.stop_call = self.mailbox.wait_for_stop.remote()
        self.num_ahead = 0.0  # batches loaded ahead, mean of the ranks
        self.encoder: Encoder = load_encoder(config.model, start.uri)
        self.numerics = Numerics(**job["numerics"])
        self.prepare_encoder()
        self.training_step = TrainingStep(
            self.encoder,
            self.numerics,
            config.train,
            self.device,
            decay_norms=config.decays_norms,
        )
        self.prefetch = DevicePrefetch(self.device)
        self.profiler = StepProfiler(config, self.rank)
        self.timer = ForwardTimer(self.encoder, self.device)
        self.start = start
        self._restore(start)
        if self.rank == 0:
            position = {"epoch": self.epoch, "step": self.step, "batch": self.batch}
            self._post("started", workers=self.num_ranks, **position)

    def prepare_encoder(self) -> None:
        """Count the encoder's arithmetic, and compile it where that is configured."""
        cfg = self.config
        self.encoder.to(self.device).train()
        self.batch_flops = count_batch_flops(self.encoder, cfg, self.device)
        if not cfg.train.compile:
            return
        share = -(-cfg.train.batch_size // self.num_ranks)
        num_images = min(share, cfg.train.micro_batch_size or share)
        self.numerics.prepare(self.encoder)
        reason = compile_encoder(self.encoder, self.numerics, cfg.data, num_images, self.device)
        if reason is not None and self.rank == 0:
            text = f"train.compile=true, but the encoder does not compile ({reason}): continuing"
            self._post("notice", text=f"{text} without")

    def _restore(self, start: Checkpoint) -> None:
        """Set the position, totals and optimiser state of a checkpoint."""
        state = start.training_state()
        if state is not None:
            self.training_step.load(state, files.join(start.uri, STATE))
        self.epoch = start.epoch  # finished epochs
        self.step = start.step  # finished steps of all epochs
        self.batch = start.batch  # finished batches of the epoch in progress
        in_a_row = int(start.info.get("skipped_in_a_row", 0))
        self.skipped = SkippedSteps(self.config.train.max_skipped_steps, self.rank, in_a_row)
        self.own_s = 0.0  # seconds that this rank spent on its own images, in this epoch
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
            plan = self.wait_for_plan(self.epoch + 1)
            if plan is None:
                self._post_stopped()
                return
            if self.rank == 0:
                self._post("waited", epoch=self.epoch + 1, since=asked, until=time.time())
            if self.batch == 0:
                self.totals.wait_s += time.time() - asked
            if self._train_epoch(plan):
                break
        self.profiler.write()
        self.writer.wait()

    def wait_for_plan(self, epoch: int) -> str | None:
        """Return the URI of an epoch's plan; None when the run is stopped.

        Raises what the last checkpoint failed with: the driver may wait for it before it plans.
        """
        call = self.mailbox.wait_for_plan.remote(epoch)
        while not ray.wait([call], timeout=1)[0]:
            self.writer.check()
        plan: str | None = ray.get(call)
        return plan

    def _post_stopped(self) -> None:
        """Post that this rank stops, once the last checkpoint is published."""
        self.writer.wait()
        if self.rank == 0:
            self._post("stopped", step=self.step, checkpoint=self.start.uri)

    def _train_epoch(self, plan: str) -> bool:
        """Train on the batches of a plan that are left; return whether the run is to stop."""
        ids = self._read_plan(plan)
        num_batches = len(ids["query_ids"])
        self.window = StepWindow(self.device)
        batches = self.loader.load(**ids, epoch=self.epoch + 1, first=self.batch)
        vote = 0
        for batch, load_s in self.prefetch(batches):
            self._run_step(batch, load_s)
            is_last = self.batch == num_batches
            every_steps = self.config.checkpoint.every_steps
            saves = every_steps is not None and self.step % every_steps == 0 and not is_last
            logs = self.batch % self.config.train.log_every_steps == 0
            if not (is_last or saves or logs):
                continue
            vote = self.meet()
            if vote or is_last or logs:
                self._log_step(num_batches)
            if is_last:
                break
            if saves or vote == _VOTES["save"]:
                self._save_within()
            if vote:
                self._post_stopped()
                return True
        self._finish_epoch()
        return vote != 0

    def _read_plan(self, plan: str) -> dict[str, Any]:
        """Return this rank's ids of a plan, as arguments of PairLoader.load.

        Raises RunError when the checkpoint within an epoch was trained on another plan.
        """
        if self.batch or self.rank == 0:
            self._check_plan(plan)
        query_ids, reference_ids = load_plan_share(plan, self.num_ranks, self.rank)
        self.clock = StepClock.from_plan(plan, is_published=self.config.protocol == "paper")
        found: dict[str, Any] = {"query_ids": query_ids, "reference_ids": reference_ids}
        if self.config.sampling.gallery_negatives:
            found["gallery_ids"] = load_gallery_share(plan, self.num_ranks, self.rank)
        return found

    def _check_plan(self, plan: str) -> None:
        """Note the plan for checkpoints; raise RunError where the run began on another one."""
        plan_sha256 = files.fingerprint(files.read_bytes(plan))
        if self.batch and plan_sha256 != self.start.info["plan_sha256"]:
            raise RunError(
                f"{plan} is not the plan that {self.start.uri} was trained on; resume from the"
                " checkpoint before it (--resume --from-epoch N)"
            )
        self.plan_info = {
            "plan": plan.removeprefix(self.config.run_dir).lstrip("/"),
            "plan_sha256": plan_sha256,
            "graph": load_record(plan).get("graph"),
        }

    def _run_step(self, batch: PairBatch, load_s: float) -> None:
        self.profiler.before_step(self.step + 1)
        result = self.training_step.step(
            batch,
            seed=step_seed(self.config.seed, self.epoch + 1, batch.number, self.rank),
            position=self.clock.position(self.epoch, batch.number, self.step),
        )
        self.window.add(batch, result, load_s)
        self.own_s += load_s
        self.step += 1
        self.batch += 1
        self.profiler.after_step(self.step)

    def meet(self) -> int:
        """Add the steps since the last meeting to the totals of all ranks, in one reduction.

        Returns the vote that rank 0 passes to all ranks: 0, or how to stop (_VOTES). Raises
        RunError when train.max_skipped_steps in a row were skipped, and what the last checkpoint
        failed with.
        """
        for batch in self.window.batches:
            if batch.bad_images:
                self._post("bad_images", reasons=list(batch.bad_images))
        own_vote = 0
        if self.rank == 0 and ray.wait([self.stop_call], timeout=0)[0]:
            own_vote = _VOTES[ray.get(self.stop_call)]
        reduced = self.window.reduce(self.totals, vote=own_vote, num_ready=self.loader.num_ready)
        self.num_ahead = reduced.num_ready
        self.own_s += self.timer.take_seconds()
        for report in self.skipped.count(
            self.window, reduced.skipped, step=self.step, epoch=self.epoch + 1
        ):
            self._post("skipped", **report)
        self.window.clear()
        self.writer.check()
        return reduced.vote

    def _log_step(self, num_batches: int) -> None:
        """Post the mean loss of the steps since the last line."""
        loss = self.totals.take_mean_loss()
        if self.rank == 0:
            line = {**self._describe_state(self.epoch + 1), "loss": loss}
            self.lines.append(line)
            self._post("step", done=self.batch, total=num_batches, ahead=self.num_ahead, **line)

    def _describe_state(self, epoch: int) -> dict[str, float]:
        return {
            "epoch": epoch,
            "step": self.step,
            "learning_rate": self.training_step.optimizer.learning_rate,
            "temperature": float((-self.encoder.logit_scale.detach()).exp().item()),
        }

    def _save_within(self) -> None:
        """Publish a checkpoint within an epoch, on rank 0."""
        if self.rank == 0:
            self._save(
                step_uri(self.config.run_dir, self.step),
                partial(self._post, "checkpoint", step=self.step),
                batch=self.batch,
                totals=asdict(self.totals),
            )

    def _save(self, uri: str, then: Callable[[], None], **info: Any) -> None:
        """Publish a checkpoint at `uri` in the writer's thread, then call `then` there.

        info: more entries of its checkpoint.json.
        """
        info = {
            "epoch": self.epoch,
            "step": self.step,
            "dim": self.encoder.dim,
            "workers": self.num_ranks,
            "random_draws": "keyed by (seed, epoch, batch, rank)",
            "lines": list(self.lines),
            "skipped_in_a_row": self.skipped.in_a_row,
            **self.plan_info,
            **info,
        }

        def publish(copy: dict[str, Any]) -> None:
            publish_checkpoint(uri, copy["weights"], copy["state"], **info)
            self.start = Checkpoint.read(uri)
            then()

        step = self.training_step
        self.writer.submit({"weights": step.weights(), "state": step.state()}, publish)

    def _finish_epoch(self) -> None:
        """Publish the epoch's checkpoint with its metrics, then post them; both on rank 0."""
        self.epoch += 1
        self.batch = 0
        cfg = self.config
        record = {
            **self._describe_state(self.epoch),
            **self.totals.record(cfg.train.batch_size, cfg.sampling.gallery_negatives > 0),
            **find_slowest_rank(self.own_s, self.device),
            **measure_gpu_memory(self.device),
            "workers": self.num_ranks,
        }
        batches_per_s = record["pairs_per_s"] / cfg.train.batch_size
        flops_per_s = self.batch_flops * batches_per_s / self.num_ranks
        record.update(describe_speed(flops_per_s, self.device, self.numerics.precision))
        if self.rank == 0:
            uri = epoch_uri(cfg.run_dir, self.epoch)
            self._save(uri, partial(self._post, "epoch", **record), record=record)
        ray.train.report(record)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # embedding actors may share the GPU
        self.own_s = 0.0
        self.totals = EpochTotals()
        self.lines.clear()
