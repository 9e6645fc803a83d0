"""The run: epochs and mining rounds, from a configuration to a folder of published artefacts."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import ray

from s4g_ray import storage
from s4g_ray.baseline import score_gradient_correlation
from s4g_ray.checks import check_against_dataset, check_resources, train_places
from s4g_ray.config import RunConfig
from s4g_ray.dataset import GeoDataset, open_dataset
from s4g_ray.embedding import embed, read_rows
from s4g_ray.encoder import Encoder, Numerics, measure_numerics, numerics_choices
from s4g_ray.errors import BadImageError, InputError
from s4g_ray.exclusions import find_exclusions
from s4g_ray.index import IndexService
from s4g_ray.mining import mine_neighbors
from s4g_ray.neighbors import NeighborGraph, geographic_graph
from s4g_ray.progress import Reporter, without_native_ray_logs
from s4g_ray.report import write_report
from s4g_ray.run_folder import Record, RunFolder, version_of
from s4g_ray.sampler import PairTable, plan_batches
from s4g_ray.scoring import score_tables
from s4g_ray.trainer import Message, Training, save_checkpoint, stamp_of


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
        folder.start()
        return _Run(config, dataset, folder, encoder, reporter or Reporter()).go(start)


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
        self.pairs: PairTable = dataset.pairs(config.data.train_split)
        self.places = train_places(config, dataset)
        self.exclusions = find_exclusions(config, dataset, self.places)
        self.barred = self.exclusions.graph() if self.exclusions else None
        self.encoder = encoder  # as the run starts
        self.seconds: dict[str, float] = {}  # of this epoch's embed, mine, plan, evaluate

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
        with IndexService(self.config.mining) as self.index:
            training = Training(self.config, self.folder.checkpoint(start), self.numerics)
            try:
                self._round(start)
                for epoch in range(start + 1, self.config.train.epochs + 1):
                    training.post_plan(epoch, self._plan(epoch))
                    self._follow_epoch(training, epoch)
                    self._round(epoch)
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
        if record["pairs_masked"] == len(self.pairs) - record["pairs_left_out"]:
            raise BadImageError("no pair of this epoch could be decoded; see bad_images.jsonl in the run folder")
        self.reporter.line(
            f"epoch {record['epoch']:>3}  loss {record['loss']:.3f}  temperature {record['temperature']:.4f}"
            f"  hardness {record['hardness']:.1f}  left out {record['pairs_left_out']}"
            f"  {record['pairs_per_s']:.0f} pairs/s"
        )

    def _round(self, epoch: int) -> None:
        """After an epoch: embeddings, neighbors and metrics where they are due and not there yet."""
        mining, evaluating = self._mines_after(epoch), self._evaluates_after(epoch)
        evaluating = evaluating and not self._records("evaluation", epoch)
        mining = mining and not self._graph_is_current(epoch)
        self.seconds = {}
        if mining or evaluating:
            cfg = self.config.data
            self._embed(epoch, [s for s, due in ((cfg.train_split, mining), (cfg.test_split, evaluating)) if due])
        if mining:
            self._mine(epoch)
        if evaluating:
            self._evaluate(epoch)
        if self.seconds:
            self.folder.log("round", epoch=epoch, **{f"{name}_s": s for name, s in self.seconds.items()})
        self._prune(epoch)

    def _mines_after(self, epoch: int) -> bool:
        due = epoch > 0 and epoch % self.config.mining.every_epochs == 0
        return due and self.config.sampling.mode == "similarity" and epoch < self.config.train.epochs

    def _evaluates_after(self, epoch: int) -> bool:
        cfg = self.config.evaluation
        if epoch == 0:
            return cfg.before_training
        return epoch % cfg.every_epochs == 0 or epoch == self.config.train.epochs

    def _plan(self, epoch: int) -> str:
        """Build and save the plan of an epoch."""
        cfg, uri = self.config.sampling, self.folder.path(f"plans/epoch={epoch:04d}.parquet")
        with self._timed("plan"):
            graph, version = self._graph_for(epoch)
            plan = plan_batches(
                self.pairs, graph, batch_size=self.config.train.batch_size,
                num_hard_negatives=cfg.num_hard_negatives, neighbor_pool_size=cfg.neighbor_pool_size,
                seed=self.config.seed, epoch=epoch, protocol=self.config.protocol,
                exclusions=self.barred,
            )  # fmt: skip
            if not len(plan.batches):
                raise InputError(
                    f"no batch of {self.config.train.batch_size} places can be built: each place may not meet up to"
                    f" {self.exclusions.most if self.exclusions else 0} others; lower sampling.exclude_radius_m or"
                    " train.batch_size"
                )
            plan.save(uri, self.pairs, **asdict(plan.stats), graph=version)
        self._plan_stats: Record = {
            "hardness": plan.stats.hardness,
            "pairs_left_out": plan.stats.num_left_out,
            "graph": version,
            "plan_s": self.seconds["plan"],
        }
        return uri

    def _graph_for(self, epoch: int) -> tuple[NeighborGraph | None, str]:
        """The newest graph that an epoch may use: one mined after an earlier epoch, else the geographic one."""
        if self.config.sampling.mode == "random":
            return None, "none"
        mined = [e for e in range(1, epoch) if self._mines_after(e)]
        if mined:
            return NeighborGraph.load(self._graph_uri(mined[-1])), f"similarity v={mined[-1]:04d}"
        uri = self._graph_uri(0)
        if not storage.is_published(uri):
            places, k = self.places, self.config.sampling.neighbor_pool_size
            graph = geographic_graph(places.ids, places.lat, places.lon, k, self.exclusions)
            graph.save(uri, info={"source": "geographic", "dataset": self.dataset.fingerprint})
        return NeighborGraph.load(uri), "geographic"

    def _graph_is_current(self, epoch: int) -> bool:
        """Whether an epoch's graph is there, mined from the checkpoint that is there."""
        uri = self._graph_uri(epoch)
        return storage.is_published(uri) and storage.open_published(uri, "neighbors").stamp == self._stamp(epoch)

    def _graph_uri(self, epoch: int) -> str:
        return self.folder.path(f"neighbors/v={epoch:04d}")

    def _embeddings_uri(self, epoch: int) -> str:
        return self.folder.path(f"embeddings/v={epoch:04d}")

    def _stamp(self, epoch: int) -> storage.Stamp:
        return stamp_of(self.config, self.encoder, self.folder.checkpoint(epoch), self.dataset.fingerprint)

    def _embed(self, epoch: int, splits: list[str]) -> None:
        with self._timed("embed"), self.reporter.stage(f"embedding {' and '.join(splits)}") as update:
            report = embed(
                self.config, self.dataset, self.folder.checkpoint(epoch), self._embeddings_uri(epoch),
                splits=splits, numerics=self.numerics, stamp=self._stamp(epoch), on_progress=update,
            )  # fmt: skip
        self.folder.log_bad_images(report.bad_images)
        self.folder.log(
            "embedding", epoch=epoch, splits=splits, images=report.images, seconds=report.seconds,
            warm_images_per_s=report.warm_images_per_s, bad_images=len(report.bad_images),
        )  # fmt: skip
        left_out = f", left out {len(report.bad_images)}" if report.bad_images else ""
        self.reporter.line(f"           embedded {report.images} images{left_out} in {report.seconds:.0f} s")

    def _mine(self, epoch: int) -> None:
        uri, cfg = self._embeddings_uri(epoch), self.config.mining
        references = self.dataset.table("references", [self.config.data.train_split])
        train_queries = self.dataset.table("queries", [self.config.data.train_split])
        with self._timed("mine"), self.reporter.stage("mining neighbors") as update:
            queries, _ = read_rows(uri, "queries", train_queries, stamp=self._stamp(epoch))
            _, indexed = read_rows(uri, "references", references)
            indexed = indexed.take(np.flatnonzero(np.isin(indexed.place_ids, self.places.ids)))
            indexed = indexed.take(np.argsort(indexed.ids))
            size = self.index.build(epoch, uri, indexed.ids)
            graph = mine_neighbors(
                self.index, epoch, queries, indexed.ids, indexed.place_ids,
                k=self.config.sampling.neighbor_pool_size, block=cfg.query_block,
                exclusions=self.exclusions, on_progress=update,
            )  # fmt: skip
            graph.save(self._graph_uri(epoch), stamp=self._stamp(epoch), info={"source": "similarity"})
        overlap = self._overlap_with_geographic(graph)
        self.folder.log("mining", epoch=epoch, references=size, places=len(graph.place_ids), overlap=overlap)
        self.reporter.line(
            f"           mined {graph.neighbors.shape[1]} neighbors of {len(graph.place_ids)} places,"
            f" {overlap:.0%} of them geographic"
        )

    def _overlap_with_geographic(self, graph: NeighborGraph) -> float:
        """The share of a graph's neighbors that are geographic ones too."""
        near = NeighborGraph.load(self._graph_uri(0))
        rows = np.searchsorted(near.place_ids, graph.place_ids)
        shared = [np.isin(a[a >= 0], b).sum() for a, b in zip(graph.neighbors, near.neighbors[rows], strict=True)]
        return float(np.sum(shared) / max((graph.neighbors >= 0).sum(), 1))

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
            f"data set {self.dataset.name}: {len(self.pairs)} train pairs, {len(self.places.ids)} places"
        )
        if self.exclusions:
            pairs = len(self.exclusions) // 2
            self.reporter.line(f"{pairs} pairs of places are never negatives of each other (protocol {cfg.protocol})")
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
