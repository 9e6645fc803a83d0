"""The run: epochs with mining rounds between or beside them, from a configuration to a folder of artefacts."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import ray

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.tables.batch_plan import load_record
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.session import ray_session
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics, measure_numerics, numerics_choices
from s4g_ray.errors import BadImageError, InputError, RunError
from s4g_ray.pipeline.planner import Planner
from s4g_ray.pipeline.preemption import PreemptedError, Preemption
from s4g_ray.pipeline.preflight import check_against_dataset, check_index, check_resources
from s4g_ray.pipeline.prometheus import Exporter
from s4g_ray.pipeline.report.page import write_report
from s4g_ray.pipeline.rounds.coordinator import Coordinator
from s4g_ray.pipeline.rounds.graphs import RunGraphs
from s4g_ray.pipeline.rounds.miner import Miner
from s4g_ray.pipeline.rounds.mining_round import MiningRound, Span, overlap
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run_folder import Record, RunFolder, RunResult, result_of
from s4g_ray.progress import Reporter, Update
from s4g_ray.storage import s3_settings
from s4g_ray.training.mailbox import Message
from s4g_ray.training.trainer import Training

CLOSE_S = 30.0  # for workers to end


def run(config: RunConfig, *, resume: bool = False, reporter: Reporter | None = None) -> RunResult:
    """Train, mine and evaluate as configured; everything is published in `config.run_dir`.

    A run folder that exists is gone on with only when `resume` is given. SIGTERM ends the run within
    checkpoint.grace_s, with a checkpoint of the step that it came in. Raises InputError for bad input (before
    anything is written), RunError when the run cannot go on.
    """
    s3_settings.apply(config.storage)
    preemption = Preemption()
    with preemption.watched():
        dataset = open_dataset(config.data.uri)
        check_against_dataset(config, dataset)
        folder = RunFolder.open(config, dataset, resume=resume)
        start = newest_checkpoint(folder.uri)
        with (
            ray_session(config) as nodes,
            preemption.watched(),
        ):  # again: Ray has put a handler of its own there
            try:
                preemption.check()
                num_pairs = len(dataset.pairs(config.data.train_split))
                fits = partial(check_resources, config, num_pairs=num_pairs)
                reporter = reporter or Reporter()
                await_room(
                    config.ray, fits, nodes, reporter, tick=preemption.check
                )  # before weights are downloaded
                encoder = Encoder.build(config.model, seed=config.seed, weights=start is None)
                runner = _Run(config, dataset, folder, encoder, reporter, preemption)
                runner.check()
                folder.start()
                runner.go(start)
            except PreemptedError:
                return result_of(folder, finished=False)
        return result_of(folder, finished=True)


class _Run:
    """A run in progress, on the driver. Three threads: this one follows the training, one plans, one does rounds."""

    def __init__(
        self,
        config: RunConfig,
        dataset: GeoDataset,
        folder: RunFolder,
        encoder: Encoder,
        reporter: Reporter,
        preemption: Preemption,
    ) -> None:
        data = config.data.model_copy(update={"uri": dataset.uri})
        self.config = config.model_copy(update={"run_dir": folder.uri, "data": data})
        self.dataset, self.folder, self.reporter = dataset, folder, reporter
        self.graphs = RunGraphs.from_config(self.config, dataset, folder)
        self.planner, self.schedule = Planner(self.graphs), Schedule(self.config)
        self.encoder = encoder  # as the run starts
        self.preemption = preemption
        self.waits: list[Span] = []  # of the workers, for their plans
        self.plans: dict[int, Future[Record]] = {}
        self.finished = 0  # the last finished epoch
        self.over = threading.Event()
        self.deadline = 0.0  # of a run that SIGTERM ends

    def check(self) -> None:
        """Raises InputError for what could be known to fail only epochs later, were it not looked at now."""
        if self.config.sampling.mode == "similarity":
            for collection in self.graphs.collections:
                check_index(
                    self.config, len(self.graphs.references(collection)[0]), self.encoder.dim
                )

    def go(self, start: Checkpoint | None) -> None:
        """All epochs from the newest checkpoint on (None: there is none yet), then the report."""
        if self.folder.info["status"] == "done":
            self.reporter.line(f"{self.folder.uri} is finished already")
            return
        self._describe(start)
        if start is None:
            save_checkpoint(self.folder.checkpoint(0), self.encoder, None, epoch=0, step=0)
            start = newest_checkpoint(self.folder.uri)
            assert start is not None
        self.folder.rewind(start)
        self.exporter = self._open_exporter()
        self._restore_lines(start)
        self._train(start, self._choose_numerics())
        if (best := self.folder.info.get("best")) is not None:
            value = f"{self.config.data.val_split} {best['metric']} {best['value']:.3f}"
            self.reporter.line(
                f"best checkpoint: {self.folder.checkpoint(best['epoch'])} ({value})"
            )
        self.reporter.line(f"report: {write_report(self.folder.uri)}")
        self.folder.update(status="done")

    def _open_exporter(self) -> Exporter:
        """Whatever is logged from now on is exported."""
        data = self.config.data
        splits = {
            "evaluation": data.test_split,
            **({"validation": data.val_split} if data.val_split else {}),
        }
        exporter = Exporter(self.folder.uri, splits, self.folder.records)
        self.folder.on_record = exporter.hear
        return exporter

    def _train(self, start: Checkpoint, numerics: Numerics) -> None:
        """Set the stage: actors for rounds, their coordinator, the planner's thread, the workers."""
        miner, pool = Miner(self.graphs, self.reporter), EncoderPool(self.config)
        self.rounds = MiningRound(
            self.graphs, self.schedule, miner, pool, self.encoder, numerics, self.reporter
        )
        past = range(start.epoch + 1)
        ready = {
            e for e in past if self.schedule.mines_after(e) and not self.rounds.needs_mining(e)
        }
        first = start.epoch + 1
        self.coordinator = Coordinator(self.schedule, self.rounds, ready=ready, first_epoch=first)
        self.planning = ThreadPoolExecutor(1, thread_name_prefix="planner")
        with (
            ExitStack() as stack
        ):  # what is last here ends first: nothing is begun anew when actors are stopped
            stack.enter_context(self.coordinator)
            stack.enter_context(miner)
            stack.enter_context(pool)
            stack.callback(self.planning.shutdown, wait=False, cancel_futures=True)
            stack.callback(self.over.set)
            stack.callback(self.coordinator.end)
            for epoch in past:
                self._submit(epoch, oldest=self.schedule.version_for(first) or 0)
            self.training = Training(self.config, numerics)
            try:
                self._epochs(start)
                self.coordinator.finish(self._watch)
            except PreemptedError:
                self._preempt()
                raise
            finally:
                self.training.close(
                    max(1.0, self.deadline - time.monotonic()) if self.deadline else CLOSE_S
                )

    def _epochs(self, start: Checkpoint) -> None:
        """Plans out, epochs in, rounds between or beside them."""
        self.finished, last = start.epoch, self.config.train.epochs
        for epoch in range(start.epoch + 1, last + 1):
            self._start_planning(epoch, start)
            if self.schedule.overlaps and epoch < last:
                self._start_planning(epoch + 1, start)
            self._follow_epoch(epoch)
            self.finished = epoch
            self._submit(epoch)
            self._prune()

    def _submit(self, epoch: int, oldest: int = 0) -> None:
        """Hand an epoch's round over, as far as it is not done; graphs older than one that serves are not mined."""
        mining = epoch >= oldest and self.rounds.needs_mining(epoch)
        evaluating = self.rounds.needs_evaluation(epoch)
        if mining or evaluating:
            self.coordinator.submit(epoch, mining=mining, evaluating=evaluating)

    def _start_planning(self, epoch: int, start: Checkpoint) -> None:
        if epoch not in self.plans:
            begun = start.batch > 0 and epoch == start.epoch + 1
            self.plans[epoch] = self.planning.submit(self._plan, epoch, begun)

    def _plan(self, epoch: int, begun: bool) -> Record:
        """In the planner's thread: choose an epoch's graph, plan the epoch, and give the plan to the workers.

        begun: a checkpoint within the epoch is gone on from, with the plan that is there.
        """
        if begun:
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
        return self.finished >= epoch - 1

    def _check(self) -> None:
        """Raises what ends the run, wherever it waits."""
        self.preemption.check()
        if self.over.is_set():
            raise PreemptedError

    def _watch(self) -> None:
        """As _check, for the main thread, which shows what waits whenever it looks."""
        self._check()
        ahead = [
            epoch
            for epoch, plan in list(self.plans.items())
            if epoch > self.finished + 1 and plan.done()
        ]
        self.exporter.show_queue("plans", len(ahead))
        self.exporter.show_queue("rounds", self.coordinator.queue_length)

    def _follow_epoch(self, epoch: int) -> None:
        """Show and log an epoch until rank 0 says that its checkpoint is published."""
        with self.reporter.stage(f"epoch {epoch} of {self.config.train.epochs}") as update:
            while not self.folder.find("epoch", epoch):
                self._watch()
                self.coordinator.check()
                for plan in [plan for plan in self.plans.values() if plan.done()]:
                    plan.result()
                for message in self.training.take():
                    self.handle_message(epoch, message, update)

    def handle_message(self, epoch: int, message: Message, update: Update) -> None:
        """What the workers say in an epoch."""
        kind = message.pop("kind")
        if kind == "bad_images":
            self.folder.log_bad_images(message["reasons"])
        elif kind == "step":
            update(message.pop("done"), message.pop("total"))
            self.exporter.show_queue("batches", message.pop("ahead"))
            self.folder.log("step", **message)
        elif kind == "waited":
            self.waits.append((message["since"], message["until"]))
        elif kind == "checkpoint":
            self._prune()
        elif kind == "lost":
            self.folder.log("lost", during_epoch=epoch, **message)
            ranks = " and ".join(map(str, message["ranks"]))
            self.reporter.line(f"           lost worker {ranks}: {message['reason']}")
        elif kind == "started":
            self._start_again(epoch, message)
        elif kind == "epoch":
            self._log_epoch(message, self.plans[message["epoch"]].result())

    def _start_again(self, epoch: int, message: Message) -> None:
        """Workers have started: from the checkpoint that they name on, all is heard anew."""
        for ended in range(self.finished + 1, message["epoch"] + 1):
            if not self.folder.find(
                "epoch", ended
            ):  # who published its checkpoint died before a word
                record = Checkpoint.read(self.folder.checkpoint(ended)).info["record"]
                self._log_epoch(dict(record), self.plans[ended].result())
        self.folder.forget(message["epoch"], message["step"])
        self.folder.log(
            "workers", during_epoch=epoch, workers=message["workers"], after_step=message["step"]
        )
        if any(record["kind"] == "lost" for record in self.folder.records):
            self.reporter.line(
                f"           going on with {message['workers']} workers after step {message['step']}"
            )

    def _log_epoch(self, record: Record, plan: Record) -> None:
        record = {**record, **plan}
        if (span := self.rounds.spans.get(self._mined_version(record))) is not None:
            record["mining_overlap"] = overlap(span, self.waits)
        self.folder.log("epoch", **record)
        if record["pairs_masked"] == len(self.planner.pairs) - record["pairs_left_out"]:
            raise BadImageError(
                "no pair of this epoch could be decoded; see bad_images.jsonl in the run folder"
            )
        workers = (
            f"  {record['workers']} workers"
            if self.config.train.workers[0] < self.config.train.workers[1]
            else ""
        )
        late = "  graph late" if record["graph_late"] else ""
        waited = f"  waited {record['wait_share']:.0%}" if self.schedule.overlaps else ""
        self.reporter.line(
            f"epoch {record['epoch']:>3}  loss {record['loss']:.3f}  temperature {record['temperature']:.4f}"
            f"  hardness {record['hardness']:.1f}  left out {record['pairs_left_out']}"
            f"  {record['pairs_per_s']:.0f} pairs/s{waited}{late}{workers}"
        )

    def _mined_version(self, record: Record) -> int:
        """The version of an epoch's graph, where the epoch is the first to use it; else -1."""
        version = record["epoch"] - 1 - (record["graph_age"] or 0)
        used = [
            r for r in self.folder.records if r["kind"] == "epoch" and r["graph"] == record["graph"]
        ]
        return -1 if used else version

    def _restore_lines(self, start: Checkpoint) -> None:
        """Log what is known of the steps and the epoch before a checkpoint whose driver died before it could."""
        logged = {record["step"] for record in self.folder.records if record["kind"] == "step"}
        infos = [Checkpoint.read(self.folder.checkpoint(start.epoch)).info] if start.epoch else []
        for info in [*infos, start.info] if start.batch else infos:
            for line in info.get("lines", ()):
                if line["step"] not in logged:
                    self.folder.log("step", **line)
            if "record" in info and not self.folder.find("epoch", start.epoch):
                self.folder.log(
                    "epoch", **info["record"], **load_record(self.planner.plan_uri(start.epoch))
                )

    def _preempt(self) -> None:
        """SIGTERM has come: have a checkpoint published, where workers train, within the time that there is."""
        limit = self.config.checkpoint.grace_s
        self.deadline = time.monotonic() + limit
        self.reporter.line("SIGTERM: stopping")
        training = self.training.is_training
        try:
            self.training.stop("save")
            with self.reporter.stage("last checkpoint") as update:
                while training and time.monotonic() < self.deadline:
                    for message in self.training.take(0.5):
                        training = training and message["kind"] != "stopped"
                        self.handle_message(self.finished + 1, message, update)
                    training = training and self.training.is_training
        except (RunError, InputError) as error:
            self.reporter.line(f"           {error}")
        newest = newest_checkpoint(self.folder.uri)
        assert newest is not None
        late = f" (a later one was not ready within {limit:g} s)" if training else ""
        self.reporter.line(f"stopped; the newest checkpoint is that of step {newest.step}{late}")

    def _prune(self) -> None:
        """Keep the newest checkpoints, the first (what the run started from), the best, and what rounds still need."""
        needed = self.coordinator.waiting()  # before the best: a round names it before it ends
        needed.add(self.folder.info.get("best", {}).get("epoch", 0))
        keep = self.config.checkpoint.keep
        prune_checkpoints(self.folder.uri, keep=keep, epochs=needed, since=self.finished)

    def _choose_numerics(self) -> Numerics:
        """What the configuration says; where it says auto, what is fastest here, measured once a run."""
        if "numerics" in self.folder.info:
            return Numerics(**self.folder.info["numerics"])
        choices = numerics_choices(self.config.train)
        chosen, speeds = choices[0], {}
        if len(choices) > 1:
            measured = self._measure_numerics()
            chosen = measured[0][0]
            speeds = {numerics.name: round(speed, 1) for numerics, speed in measured}
            shown = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
            self.reporter.line(f"precision: {chosen.name} (images/s: {shown})")
        self.folder.update(numerics=asdict(chosen), numerics_measured=speeds)
        return chosen

    def _measure_numerics(self) -> list[tuple[Numerics, float]]:
        """Where a worker would run. Raises RunError when there is no room for it in time."""
        cfg, size, checkpoint = (
            self.config.train,
            self.config.data.reference_size,
            self.folder.checkpoint(0),
        )
        options = {
            "num_cpus": cfg.cpus_per_worker,
            "num_gpus": cfg.gpus,
            "label_selector": cfg.label_selector,
        }
        measure: Any = ray.remote(max_calls=1, **options)(measure_numerics)  # type: ignore[call-overload]
        call = measure.remote(
            self.config.model, cfg, size, checkpoint, "cuda" if cfg.use_gpu else "cpu"
        )
        deadline = time.monotonic() + self.config.ray.start_timeout_s
        with self.reporter.stage("measuring precisions"):
            while not ray.wait([call], timeout=1.0)[0]:
                self._check()
                if time.monotonic() > deadline:
                    raise RunError(
                        "precisions were not measured within ray.start_timeout_s: is there room for a worker? set"
                        " train.precision and train.channels_last to do without"
                    )
            return ray.get(call)  # type: ignore[no-any-return]

    def _describe(self, start: Checkpoint | None) -> None:
        cfg = self.config
        train = cfg.train
        self.reporter.line(
            f"data set {self.dataset.name}: {len(self.planner.pairs)} train pairs, {len(self.graphs.places)} places"
        )
        if self.graphs.gallery is not None:
            self.reporter.line(
                f"{len(self.graphs.gallery.ids)} references without a query serve as gallery negatives"
            )
        if (excluded := self.graphs.exclusions) is not None:
            semi = len(excluded.semi_positives) // 2
            named = [f"{semi} semi-positive pairs of places"] if semi else []
            near = [f"all places within {excluded.radius_m:g} m"] if excluded.radius_m > 0 else []
            self.reporter.line(
                f"{' and '.join(named + near)} are never negatives of each other (protocol {cfg.protocol})"
            )
        self.reporter.line(f"run folder {self.folder.uri}")
        self.reporter.line(
            f"{cfg.model.name}, {train.epochs} epochs of batches of {train.batch_size} pairs on"
            f" {' to '.join(str(n) for n in dict.fromkeys(train.workers))} workers, {cfg.sampling.mode} sampling"
        )
        if start is not None:
            within = f" and {start.batch} batches of the next" if start.batch else ""
            self.reporter.line(f"going on after epoch {start.epoch}{within} (step {start.step})")
