"""The run: epochs and mining rounds, from a configuration to a folder of published artefacts."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import ray

from s4g_ray import storage
from s4g_ray.baseline import score_gradient_correlation
from s4g_ray.checks import check_against_dataset, check_index, check_resources
from s4g_ray.config import RunConfig
from s4g_ray.dataset import GeoDataset, open_dataset
from s4g_ray.embedding import embed
from s4g_ray.encoder import Encoder, Numerics, measure_numerics, numerics_choices
from s4g_ray.errors import BadImageError, InputError
from s4g_ray.graphs import Graphs, Miner
from s4g_ray.mailbox import Message
from s4g_ray.plans import Planner
from s4g_ray.progress import Reporter, without_native_ray_logs
from s4g_ray.report import write_report
from s4g_ray.run_folder import Record, RunFolder, version_of
from s4g_ray.scoring import score_tables
from s4g_ray.trainer import Training, save_checkpoint, stamp_of


@dataclass(frozen=True)
class RunResult:
    """What a run ended with: test metrics of the trained encoder, and of the untrained one where evaluated."""

    run_dir: str
    metrics: dict[str, float]
    untrained: dict[str, float] | None
    records: list[Record] = field(repr=False)


def run(config: RunConfig, *, resume: bool = False, reporter: Reporter | None = None) -> RunResult:
    """Train, mine and evaluate as configured; everything is published in `config.run_dir`.

    A run folder that exists is gone on with only when `resume` is given. Raises InputError for bad input
    (before anything is written), RunError when the run cannot go on.
    """
    dataset = open_dataset(config.data.uri)
    check_against_dataset(config, dataset)
    folder = RunFolder.open(config, dataset, resume=resume)
    start = storage.latest_version(folder.path("checkpoints"), "epoch")
    with ray_session(config) as cluster:
        check_resources(config, cluster)  # before weights are looked for, or downloaded
        encoder = Encoder.build(config.model, seed=config.seed, weights=start is None)
        runner = _Run(config, dataset, folder, encoder, reporter or Reporter())
        runner.check()
        folder.start()
        return runner.go(start)


@contextmanager
def ray_session(config: RunConfig) -> Iterator[Mapping[str, float]]:
    """A Ray session: the caller's, that of the configured address, or one on this machine; yields its resources."""
    if ray.is_initialized():
        yield ray.cluster_resources()  # type: ignore[no-untyped-call]
        return
    # Ray Train: a dead worker is seen within a second, and nothing but our own lines is printed
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.filterwarnings("ignore", module="ray")
    remote = config.ray.address or os.environ.get("RAY_ADDRESS")
    with without_native_ray_logs():
        try:
            ray.init(
                address=remote,
                num_cpus=None if remote else config.ray.num_cpus,
                include_dashboard=None if remote else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            raise InputError(f"no Ray cluster answers at {remote}: {error}") from error
        try:
            yield ray.cluster_resources()  # type: ignore[no-untyped-call]
        finally:
            ray.shutdown()


class _Run:
    """A run in progress, on the driver."""

    def __init__(
        self, config: RunConfig, dataset: GeoDataset, folder: RunFolder, encoder: Encoder, reporter: Reporter
    ) -> None:
        data = config.data.model_copy(update={"uri": dataset.uri})
        self.config = config.model_copy(update={"run_dir": folder.uri, "data": data})
        self.dataset, self.folder, self.reporter = dataset, folder, reporter
        self.graphs = Graphs.of(self.config, dataset, folder)
        self.planner = Planner(self.graphs)
        self.encoder = encoder  # as the run starts
        self.seconds: dict[str, float] = {}  # of this epoch's embed, mine, plan, evaluate

    def check(self) -> None:
        """Raises InputError for what could be known to fail only epochs later, were it not looked at now."""
        if self.config.sampling.mode == "similarity":
            for collection in self.graphs.collections:
                check_index(self.config, len(self.graphs.references(collection)[0]), self.encoder.dim)

    def go(self, start: int | None) -> RunResult:
        """All epochs from the last published one on (None: there is none yet), then the report."""
        if self.folder.info["status"] == "done":
            self.reporter.line(f"{self.folder.uri} is finished already")
            return self._result()
        self.folder.rewind(start or 0)
        self._describe(start)
        if start is None:
            save_checkpoint(self.folder.checkpoint(0), self.encoder, None, epoch=0, step=0)
        self.numerics = self._choose_numerics()
        self._train(start or 0)
        self.folder.update(status="done")
        self.reporter.line(f"report: {write_report(self.folder.uri)}")
        return self._result()

    def _train(self, start: int) -> None:
        """Plans out, epochs in, rounds between them."""
        with Miner(self.graphs, self.reporter) as miner:
            training = Training(self.config, self.folder.checkpoint(start), self.numerics)
            try:
                self._round(start, miner)
                for epoch in range(start + 1, self.config.train.epochs + 1):
                    training.post_plan(epoch, self._plan(epoch))
                    self._follow_epoch(training, epoch)
                    self._round(epoch, miner)
            finally:
                training.close()

    def _follow_epoch(self, training: Training, epoch: int) -> None:
        """Show and log an epoch until rank 0 says that its checkpoint is published."""
        with self.reporter.stage(f"epoch {epoch} of {self.config.train.epochs}") as update:
            for message in training.messages():
                if message["kind"] == "bad_images":
                    self.folder.log_bad_images(message["reasons"])
                elif message["kind"] == "step":
                    update(message.pop("done"), message.pop("total"))
                    self.folder.log(**message)
                elif message["kind"] == "epoch":
                    self._log_epoch(message)
                    return

    def _log_epoch(self, message: Message) -> None:
        record = {**message, **self._plan_stats}
        self.folder.log(**record)
        if record["pairs_masked"] == len(self.planner.pairs) - record["pairs_left_out"]:
            raise BadImageError("no pair of this epoch could be decoded; see bad_images.jsonl in the run folder")
        self.reporter.line(
            f"epoch {record['epoch']:>3}  loss {record['loss']:.3f}  temperature {record['temperature']:.4f}"
            f"  hardness {record['hardness']:.1f}  left out {record['pairs_left_out']}"
            f"  {record['pairs_per_s']:.0f} pairs/s"
        )

    def _plan(self, epoch: int) -> str:
        with self._timed("plan"):
            uri, self._plan_stats = self.planner.plan(epoch)
        self._plan_stats["plan_s"] = self.seconds["plan"]
        return uri

    def _round(self, epoch: int, miner: Miner) -> None:
        """After an epoch: embeddings, neighbors and metrics where they are due and not there yet."""
        mining, evaluating = self.graphs.mines_after(epoch), self._evaluates_after(epoch)
        evaluating = evaluating and not self._records("evaluation", epoch)
        mining = mining and not self._is_mined(epoch)
        self.seconds = {}
        if mining or evaluating:
            self._embed(epoch, self._splits(mining, evaluating))
        if mining:
            self._mine(epoch, miner)
        if evaluating:
            self._evaluate(epoch)
        if self.seconds:
            self.folder.log("round", epoch=epoch, **{f"{name}_s": s for name, s in self.seconds.items()})
        self._prune(epoch)

    def _splits(self, mining: bool, evaluating: bool) -> list[str]:
        """The splits that a round embeds."""
        cfg, gallery = self.config.data, self.graphs.gallery is not None
        splits = [cfg.train_split, *self.config.sampling.gallery_splits * gallery] if mining else []
        return list(dict.fromkeys([*splits, *[cfg.test_split] * evaluating]))

    def _evaluates_after(self, epoch: int) -> bool:
        cfg = self.config.evaluation
        if epoch == 0:
            return cfg.before_training
        return epoch % cfg.every_epochs == 0 or epoch == self.config.train.epochs

    def _embeddings_uri(self, epoch: int) -> str:
        return self.folder.path(f"embeddings/v={epoch:04d}")

    def _stamp(self, epoch: int) -> storage.Stamp:
        return stamp_of(self.config, self.encoder, self.folder.checkpoint(epoch), self.dataset.fingerprint)

    def _embed(self, epoch: int, splits: list[str]) -> None:
        uri = self._embeddings_uri(epoch)
        if storage.is_published(uri):  # by a run that was cut off later in this round
            found = storage.open_published(uri, "embeddings")
            if found.stamp == self._stamp(epoch) and set(splits) <= set(found.info["splits"]):
                return
        with self._timed("embed"), self.reporter.stage(f"embedding {' and '.join(splits)}") as update:
            report = embed(
                self.config, self.dataset, self.folder.checkpoint(epoch), uri,
                splits=splits, numerics=self.numerics, stamp=self._stamp(epoch), on_progress=update,
            )  # fmt: skip
        self.folder.log_bad_images(report.bad_images)
        self.folder.log(
            "embedding", epoch=epoch, splits=splits, images=report.images, seconds=report.seconds,
            warm_images_per_s=report.warm_images_per_s, bad_images=len(report.bad_images),
        )  # fmt: skip
        left_out = f", left out {len(report.bad_images)}" if report.bad_images else ""
        self.reporter.line(f"           embedded {report.images} images{left_out} in {report.seconds:.0f} s")

    def _mine(self, epoch: int, miner: Miner) -> None:
        logged = self._logged_collections(epoch)
        with self._timed("mine"):
            for record in miner.mine(epoch, self._embeddings_uri(epoch), self._stamp(epoch)):
                if record["collection"] not in logged:
                    self.folder.log("mining", epoch=epoch, **record)

    def _is_mined(self, epoch: int) -> bool:
        """Whether an epoch's graphs are there, mined from the checkpoint that is there, and logged."""
        stamp, logged = self._stamp(epoch), self._logged_collections(epoch)
        return all(c in logged and self.graphs.is_current(epoch, c, stamp) for c in self.graphs.collections)

    def _logged_collections(self, epoch: int) -> set[str]:
        return {record["collection"] for record in self._records("mining", epoch)}

    def _evaluate(self, epoch: int) -> None:
        uri, cfg = self._embeddings_uri(epoch), self.config
        with self._timed("evaluate"), self.reporter.stage("evaluating"):
            found = score_tables(
                self.dataset, cfg.data.test_split, uri, uri, stamp=self._stamp(epoch), radii_m=cfg.evaluation.radii_m
            )
            if epoch == 0 and cfg.evaluation.correlation_baseline:
                baseline = score_gradient_correlation(cfg, self.dataset).of(cfg.protocol)
                self.folder.log("baseline", epoch=0, name="gradient correlation", **baseline)
        self.folder.log("evaluation", epoch=epoch, **found.of(cfg.protocol))
        self.reporter.line(f"           test {found.summary(cfg.protocol)}")

    def _prune(self, epoch: int) -> None:
        """Keep the newest checkpoints, and the first: it is what the run started from."""
        oldest = epoch - self.config.train.keep_checkpoints
        for name in storage.list_names(self.folder.path("checkpoints")):
            number = version_of(name)
            if number is not None and 0 < number <= oldest:
                storage.remove(self.folder.checkpoint(number))

    def _choose_numerics(self) -> Numerics:
        """What the configuration says; where it says auto, what is fastest here, measured once a run."""
        if "numerics" in self.folder.info:
            return Numerics(**self.folder.info["numerics"])
        cfg, choices = self.config.train, numerics_choices(self.config.train)
        chosen, speeds = choices[0], {}
        if len(choices) > 1:
            remote = ray.remote(num_cpus=cfg.cpus_per_worker, num_gpus=cfg.gpus, max_calls=1)
            measure = remote(measure_numerics)
            device = "cuda" if cfg.use_gpu else "cpu"
            with self.reporter.stage("measuring precisions"):
                size, checkpoint = self.config.data.reference_size, self.folder.checkpoint(0)
                measured = ray.get(measure.remote(self.config.model, cfg, size, checkpoint, device))
            chosen = measured[0][0]
            speeds = {_numerics_name(numerics): round(speed, 1) for numerics, speed in measured}
            shown = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
            self.reporter.line(f"precision: {_numerics_name(chosen)} (images/s: {shown})")
        self.folder.update(numerics=asdict(chosen), numerics_measured=speeds)
        return chosen

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def _describe(self, start: int | None) -> None:
        cfg = self.config
        train = cfg.train
        self.reporter.line(
            f"data set {self.dataset.name}: {len(self.planner.pairs)} train pairs, {len(self.graphs.places)} places"
        )
        if self.graphs.gallery is not None:
            self.reporter.line(f"{len(self.graphs.gallery.ids)} references without a query serve as gallery negatives")
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
            f" {train.num_workers} workers, {cfg.sampling.mode} sampling"
        )
        if start is not None:
            self.reporter.line(f"going on after epoch {start}")

    def _records(self, kind: str, epoch: int) -> list[Record]:
        return [r for r in self.folder.records if r["kind"] == kind and r["epoch"] == epoch]

    def _result(self) -> RunResult:
        evaluations = [r for r in self.folder.records if r["kind"] == "evaluation"]
        metrics = [{k: v for k, v in r.items() if isinstance(v, float)} for r in evaluations]
        for values in metrics:
            del values["time"]
        untrained = metrics[0] if evaluations and evaluations[0]["epoch"] == 0 else None
        return RunResult(self.folder.uri, metrics[-1], untrained, self.folder.records)


def _numerics_name(numerics: Numerics) -> str:
    return numerics.precision + (" channels_last" if numerics.channels_last else "")
