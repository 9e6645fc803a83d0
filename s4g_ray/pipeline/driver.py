"""Train the epochs of a run, with mining rounds between or beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.tables.batch_plan import load_record
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.placement_gate import make_gate
from s4g_ray.distributed.session import ray_session
from s4g_ray.distributed.worker_warnings import shown_warnings
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import InputError, OwnershipLostError, RunError
from s4g_ray.pipeline.branches.make_branch import make_branch
from s4g_ray.pipeline.budget.disk_check import check_disk
from s4g_ray.pipeline.callbacks import Callback, CallbackList
from s4g_ray.pipeline.loggers.run_loggers import RunLoggers
from s4g_ray.pipeline.planner import Planner
from s4g_ray.pipeline.precision_choice import choose_numerics
from s4g_ray.pipeline.preemption import PreemptedError, Preemption
from s4g_ray.pipeline.preflight import check_index, check_resources
from s4g_ray.pipeline.prometheus import Exporter
from s4g_ray.pipeline.report.page import write_report
from s4g_ray.pipeline.retention.artefacts import Retention
from s4g_ray.pipeline.rounds.coordinator import Coordinator
from s4g_ray.pipeline.rounds.graphs import RunGraphs
from s4g_ray.pipeline.rounds.miner import Miner
from s4g_ray.pipeline.rounds.mining_round import MiningRound, Span
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run_folder import Record, RunFolder, RunResult, find_start, result_of
from s4g_ray.pipeline.run_log import RunLog, describe_run
from s4g_ray.progress import Reporter
from s4g_ray.storage.ownership.lease import Lease
from s4g_ray.training.trainer import Training

CLOSE_S = 30.0  # for workers to end


def train_in_folder(
    config: RunConfig,
    dataset: GeoDataset,
    split: TrainSplit,
    lease: Lease,
    *,
    resume: bool,
    from_epoch: int | None,
    reporter: Reporter,
    preemption: Preemption,
    callbacks: Sequence[Callback],
) -> tuple[RunResult, str]:
    """Train, mine and evaluate in the folder of a lease, as run(), which has checked the input.

    Returns the result and, of a run that SIGTERM has ended, a line about its newest checkpoint.
    """
    folder = RunFolder.open(config, dataset, resume=resume, from_epoch=from_epoch)
    folder.guard = lease.watch
    start = find_start(folder)
    try:
        preemption.check()
        # watched again in the session: Ray installs a handler of its own
        with ray_session(config.ray, config.storage) as nodes, preemption.watched():
            preemption.check()
            fits = partial(check_resources, config, num_pairs=len(split.pairs))
            # before weights are downloaded
            await_room(config.ray, fits, nodes, reporter, tick=preemption.check)
            build = partial(Encoder.build, config.model, seed=config.seed, report=reporter.line)
            encoder = build(weights=start is None)
            driver = Driver(
                config, dataset, split, folder, encoder, reporter, preemption, callbacks
            )
            driver.check_indexes()
            check_disk(folder, dataset, split, encoder, reporter)
            if folder.branch is not None:
                reporter.line(folder.branch.summary())
                with reporter.stage("keeping what followed"):
                    make_branch(folder)
            folder.start()
            driver.train(start)
            return result_of(folder, finished=True, ray_result=driver.ray_result), ""
    except PreemptedError as end:
        return result_of(folder, finished=False), str(end)


class Driver:
    """A run in progress.

    Three threads: this one follows the training, one plans (the planner's), one does mining and
    evaluation rounds (the coordinator's).
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: GeoDataset,
        split: TrainSplit,
        folder: RunFolder,
        encoder: Encoder,
        reporter: Reporter,
        preemption: Preemption,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        data = config.data.model_copy(update={"uri": dataset.uri})
        self.config = config.model_copy(update={"run_dir": folder.uri, "data": data})
        self.dataset = dataset
        self.split = split
        self.folder = folder
        self.reporter = reporter
        self.preemption = preemption
        self.encoder = encoder  # with the weights that the run starts from
        self.graphs = RunGraphs.from_config(config, split, dataset.fingerprint, folder)
        self.planner = Planner(self.graphs, seed=config.seed, protocol=config.protocol)
        self.schedule = Schedule(self.config)
        self.plans: dict[int, Future[Record]] = {}
        self.mining_spans: dict[int, Span] = {}
        self.loggers = RunLoggers.from_config(self.config, folder, reporter)
        # loggers first: a callback cannot change what they receive
        self.callbacks = CallbackList([self.loggers, *callbacks])
        self.over = threading.Event()
        self.deadline = 0.0  # of a run that SIGTERM ends
        self.ray_result: Any = None  # of Ray Train, once training has ended

    def check_indexes(self) -> None:
        """Raise InputError where a mining round would fail epochs later."""
        is_searched = self.config.mining.scope == "global"
        if self.config.sampling.mode != "similarity" or not is_searched:
            return
        for collection in self.graphs.collections:
            ids, _ = self.graphs.references(collection)
            check_index(self.config.mining, len(ids), self.encoder.dim)

    def train(self, start: Checkpoint | None) -> None:
        """Train all epochs after a checkpoint (None: from the first), then write the report."""
        self.dataset.release_columns()  # rounds read what they need from the files
        if self.folder.info["status"] == "done":
            self.reporter.line(f"{self.folder.uri} is finished already")
            return
        for line in describe_run(self.config, self.dataset.name, self.split, start):
            self.reporter.line(line)
        if start is None:
            save_checkpoint(self.folder.checkpoint(0), self.encoder, None, epoch=0, step=0)
            start = newest_checkpoint(self.folder.uri)
            assert start is not None
        self.folder.rewind(start)
        self.exporter = self._open_exporter()
        self.log = self._open_log()
        with self.loggers.running(self.folder.records, self._seconds_to_close):
            self._train_and_report(start)
        self.folder.update(status="done")

    def _train_and_report(self, start: Checkpoint) -> None:
        self.log.restore_lines(start, self.planner.plan_uri(start.epoch))
        tick = self._check
        self._train(start, choose_numerics(self.config, self.folder, self.reporter, tick))
        self.callbacks.check()
        best = self.folder.info.get("best")
        if best is not None:
            value = f"{self.config.data.val_split} {best['metric']} {best['value']:.3f}"
            self.reporter.line(
                f"best checkpoint: {self.folder.checkpoint(best['epoch'])} ({value})"
            )
        report = write_report(self.folder.uri, show=self.loggers.show)
        self.reporter.line(f"report: {report}")

    def _open_exporter(self) -> Exporter:
        """Export every record that is logged from now on, and pass it to the callbacks."""
        splits = {"evaluation": self.config.data.test_split}
        if self.config.data.val_split:
            splits["validation"] = self.config.data.val_split
        exporter = Exporter(self.folder.uri, splits, self.folder.records)
        self.folder.on_record = self._handle_record
        return exporter

    def _handle_record(self, record: Record) -> None:
        self.exporter.export(record)
        self.callbacks.handle_line(record)

    def _open_log(self) -> RunLog:
        workers = self.config.train.workers
        return RunLog(
            self.folder,
            self.reporter,
            self.exporter,
            self.schedule,
            plans=self.plans,
            spans=self.mining_spans,
            num_pairs=len(self.split.pairs),
            is_elastic=workers[0] < workers[1],
            on_checkpoint=lambda: self.retention.prune_checkpoints(self.log.finished),
        )

    def _train(self, start: Checkpoint, numerics: Numerics) -> None:
        """Start the rounds' actors, their coordinator, the planner's thread and the workers."""
        cfg = self.config
        timeout_s = cfg.ray.start_timeout_s
        takes_gpus = cfg.placed_embedding.gpus_per_actor or cfg.mining.gpus_per_shard
        gate = make_gate(cfg.train.use_gpu and bool(takes_gpus))
        miner = Miner(
            self.graphs,
            cfg.settled_mining,
            self.reporter,
            seed=cfg.seed,
            ray=cfg.ray,
            gate=gate,
            regions_of=self.dataset.query_regions,
        )
        cpus = cfg.train.workers[1] * cfg.train.cpus_per_worker
        pool = EncoderPool(cfg.model, cfg.placed_embedding, timeout_s, gate, worker_cpus=cpus)
        self.rounds = MiningRound(
            cfg,
            self.dataset,
            self.graphs,
            self.schedule,
            miner,
            pool,
            self.encoder,
            numerics,
            self.reporter,
            spans=self.mining_spans,
        )
        past = range(start.epoch + 1)
        first = start.epoch + 1
        ready = self._list_mined(past)
        self.coordinator = Coordinator(self.schedule, self.rounds, ready=ready, first_epoch=first)
        self.retention = Retention(self.folder, cfg, self.coordinator)
        self.planning = ThreadPoolExecutor(1, thread_name_prefix="planner")
        # the last entry ends first: nothing starts anew once the actors are stopped
        with ExitStack() as stack:
            if gate is not None:
                stack.enter_context(gate)
            if cfg.train.use_gpu:
                stack.enter_context(shown_warnings(self.reporter.line))
            stack.enter_context(self.coordinator)
            stack.enter_context(miner)
            stack.enter_context(pool)
            stack.callback(self.planning.shutdown, wait=False, cancel_futures=True)
            stack.callback(self.over.set)
            stack.callback(self.coordinator.end)
            for epoch in past:
                self._submit_round(epoch, oldest=self.schedule.version_for(first) or 0)
            self.training = Training(cfg, numerics, gate.actor if gate is not None else None)
            try:
                self._train_epochs(start)
                self.coordinator.finish(self._watch)
                self.retention.apply(self.log.finished)
            except PreemptedError as end:
                raise PreemptedError(self._save_and_stop()) from end
            finally:
                self.training.close(self._seconds_to_close())
                self.ray_result = self.training.result

    def _list_mined(self, past: range) -> set[int]:
        """Return the epochs, of those before, whose mining is done."""
        mined = [epoch for epoch in past if self.schedule.mines_after(epoch)]
        return {epoch for epoch in mined if not self.rounds.needs_mining(epoch)}

    def _seconds_to_close(self) -> float:
        if self.deadline:
            return max(1.0, self.deadline - time.monotonic())
        return CLOSE_S

    def _train_epochs(self, start: Checkpoint) -> None:
        """Plan each epoch, one ahead where it waits for no round; follow it; submit its round."""
        last = self.config.train.epochs
        self.log.finished = start.epoch
        for epoch in range(start.epoch + 1, last + 1):
            self._start_planning(epoch, start)
            if epoch < last and self.schedule.plans_ahead(epoch):
                self._start_planning(epoch + 1, start)
            self._follow_epoch(epoch)
            self.log.finished = epoch
            self._submit_round(epoch)
            self.retention.apply(self.log.finished)

    def _submit_round(self, epoch: int, oldest: int = 0) -> None:
        """Submit what is not done of an epoch's round; graphs before `oldest` are not mined."""
        mining = epoch >= oldest and self.rounds.needs_mining(epoch)
        evaluating = self.rounds.needs_evaluation(epoch)
        if mining or evaluating:
            self.coordinator.submit(epoch, mining=mining, evaluating=evaluating)

    def _start_planning(self, epoch: int, start: Checkpoint) -> None:
        if epoch not in self.plans:
            is_begun = start.batch > 0 and epoch == start.epoch + 1
            self.plans[epoch] = self.planning.submit(self._plan, epoch, is_begun)

    def _plan(self, epoch: int, is_begun: bool) -> Record:
        """Choose an epoch's graph, plan the epoch, and post the plan to the workers.

        Runs in the planner's thread. is_begun: a checkpoint within the epoch is resumed, with the
        plan that exists.
        """
        if is_begun:
            record = load_record(self.planner.plan_uri(epoch))
        else:
            late = partial(self._is_due, epoch)
            version = self.coordinator.graph_for(epoch, late=late, check=self._check)
            started = time.perf_counter()
            record = self.planner.plan_epoch(epoch, version, due=self.schedule.version_for(epoch))
            record["plan_s"] = time.perf_counter() - started
        self.training.post_plan(epoch, self.planner.plan_uri(epoch))
        return record

    def _is_due(self, epoch: int) -> bool:
        """Whether an epoch could begin now."""
        return self.log.finished >= epoch - 1

    def _check(self) -> None:
        """Raise what ends the run; called wherever the run waits."""
        try:
            self.folder.guard()
        except OwnershipLostError:
            self.deadline = time.monotonic()  # end the workers at once
            raise
        self.preemption.check()
        self.callbacks.check()
        if self.over.is_set():
            raise PreemptedError

    def _watch(self) -> None:
        """Do as _check, export the lengths of the queues, and prune; for the main thread."""
        self._check()
        self.retention.apply_after_round(self.log.finished)
        ahead = 0
        for epoch, plan in list(self.plans.items()):
            if epoch > self.log.finished + 1 and plan.done():
                ahead += 1
        self.exporter.show_queue("plans", ahead)
        self.exporter.show_queue("rounds", self.coordinator.queue_length)

    def _follow_epoch(self, epoch: int) -> None:
        """Show and log an epoch until rank 0 reports that its checkpoint is published."""
        title = f"epoch {epoch} of {self.config.train.epochs}"
        with self.reporter.stage(title, self.training.waits_for) as update:
            while not self.folder.find("epoch", epoch):
                self._watch()
                self.coordinator.check()
                for plan in list(self.plans.values()):
                    if plan.done():
                        plan.result()  # raises what planning raised
                for message in self.training.take():
                    self.log.handle_message(epoch, message, update)

    def _save_and_stop(self) -> str:
        """After SIGTERM: have the workers publish a checkpoint within checkpoint.grace_s.

        Returns a line about it.
        """
        limit = self.config.checkpoint.grace_s
        self.deadline = time.monotonic() + limit
        self.reporter.line("SIGTERM: stopping")
        is_training = self.training.is_training
        try:
            self.training.stop("save")
            with self.reporter.stage("last checkpoint") as update:
                while is_training and time.monotonic() < self.deadline:
                    for message in self.training.take(0.5):
                        is_training = is_training and message["kind"] != "stopped"
                        self.log.handle_message(self.log.finished + 1, message, update)
                    is_training = is_training and self.training.is_training
        except (RunError, InputError) as error:
            self.reporter.line(f"           {error}")
        newest = newest_checkpoint(self.folder.uri)
        assert newest is not None
        late = f" (a later one was not ready within {limit:g} s)" if is_training else ""
        return f"stopped; the newest checkpoint is that of step {newest.step}{late}"
