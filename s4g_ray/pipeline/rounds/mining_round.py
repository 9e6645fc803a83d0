"""The work of a round: embed a checkpoint, mine its graphs, score it; what is there already is not done again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import checkpoint_stamp
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import RunError
from s4g_ray.evaluation.gradient_correlation import score_gradient_correlation
from s4g_ray.evaluation.scores import Score, score_tables
from s4g_ray.pipeline.rounds.graphs import RunGraphs
from s4g_ray.pipeline.rounds.miner import Miner
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.progress import Reporter
from s4g_ray.storage.manifest import Stamp, is_published, open_published

Span = tuple[float, float]  # seconds since the epoch of time.time()


class MiningRound:
    """Does rounds, one at a time, for the coordinator. spans: when each round's mining began and ended."""

    def __init__(
        self,
        config: RunConfig,
        dataset: GeoDataset,
        graphs: RunGraphs,
        schedule: Schedule,
        miner: Miner,
        pool: EncoderPool,
        encoder: Encoder,
        numerics: Numerics,
        reporter: Reporter,
        *,
        spans: dict[int, Span],
    ) -> None:
        self._config = config
        self._dataset = dataset
        self._graphs = graphs
        self._folder = graphs.folder
        self._schedule = schedule
        self._miner = miner
        self._pool = pool
        self._encoder = encoder
        self._numerics = numerics
        self._reporter = reporter
        self._spans = spans
        self._seconds: dict[str, float] = {}  # of this round's embed, mine, evaluate

    def mine(self, epoch: int) -> None:
        """Embed and mine an epoch's checkpoint, and embed what its evaluation needs with it."""
        began = time.time()
        self._embed(epoch, mining=True, evaluating=self._schedule.evaluates_after(epoch))
        with self._timed("mine"):
            for record in self._miner.mine(epoch, self._embeddings(epoch), self._stamp(epoch)):
                if record["collection"] not in self._logged(epoch):
                    self._folder.log("mining", epoch=epoch, **record)
        self._spans[epoch] = (began, time.time())
        if not self.needs_evaluation(epoch):
            self._log_round(epoch)

    def evaluate(self, epoch: int) -> None:
        """Embed and score an epoch's checkpoint, on the test split and on the validation split."""
        self._embed(epoch, mining=False, evaluating=True)
        with self._timed("evaluate"), self._reporter.stage("evaluating"):
            if self._config.data.val_split is not None and not self._folder.find(
                "validation", epoch
            ):
                self._validate(epoch, self._config.data.val_split)
            self._test(epoch)
        self._log_round(epoch)

    def failed(self, what: str, epoch: int, attempt: int, error: RunError, last: bool) -> None:
        """Say that a try has failed."""
        self._seconds = {}
        goes_on = last and what == "mining" and self._schedule.overlaps
        then = (
            "training goes on with the graph that is there"
            if goes_on
            else "given up"
            if last
            else "trying again"
        )
        self._folder.log(
            "round_failed",
            epoch=epoch,
            what=what,
            attempt=attempt,
            reason=str(error),
            given_up=last,
        )
        self._reporter.line(
            f"           {what} after epoch {epoch} failed ({attempt}): {error}; {then}"
        )

    def needs_evaluation(self, epoch: int) -> bool:
        """Whether an epoch is to be evaluated, is not yet, and still can be."""
        due = self._schedule.evaluates_after(epoch) and not self._folder.find("evaluation", epoch)
        return due and is_published(self._folder.checkpoint(epoch))

    def needs_mining(self, epoch: int) -> bool:
        """Whether an epoch is to be mined, and its graphs, mined from the checkpoint that is there, are not yet."""
        if not self._schedule.mines_after(epoch):
            return False
        published = is_published(self._folder.checkpoint(epoch))
        stamp, logged = self._stamp(epoch) if published else None, self._logged(epoch)
        return not all(
            c in logged and self._graphs.is_there(epoch, c, stamp) for c in self._graphs.collections
        )

    def _logged(self, epoch: int) -> set[str]:
        return {record["collection"] for record in self._folder.find("mining", epoch)}

    def _embeddings(self, epoch: int) -> str:
        return self._folder.path(f"embeddings/v={epoch:04d}")

    def _stamp(self, epoch: int) -> Stamp:
        return checkpoint_stamp(
            self._config, self._encoder, self._folder.checkpoint(epoch), self._dataset.fingerprint
        )

    def _splits(self, mining: bool, evaluating: bool) -> list[str]:
        """The splits that a round embeds."""
        cfg = self._config.data
        splits = []
        if mining:
            splits.append(cfg.train_split)
            if self._graphs.split.gallery is not None:
                splits.extend(self._config.sampling.gallery_splits)
        if evaluating:
            if cfg.val_split is not None:
                splits.append(cfg.val_split)
            splits.append(cfg.test_split)
        return list(dict.fromkeys(splits))

    def _embed(self, epoch: int, *, mining: bool, evaluating: bool) -> None:
        uri = self._embeddings(epoch)
        splits = self._splits(mining, evaluating)
        stamp = self._stamp(epoch)
        if is_published(uri):  # by a round that was cut off, or for its mining
            found = open_published(uri, "embeddings")
            if found.stamp == stamp and set(splits) <= set(found.info["splits"]):
                return
        with (
            self._timed("embed"),
            self._reporter.stage(f"embedding {' and '.join(splits)}") as update,
        ):
            report = embed(
                self._pool,
                self._config,
                self._dataset,
                self._folder.checkpoint(epoch),
                uri,
                splits=splits,
                numerics=self._numerics,
                stamp=stamp,
                on_progress=update,
            )
        self._folder.log_bad_images(report.bad_images)
        self._folder.log(
            "embedding",
            epoch=epoch,
            splits=splits,
            images=report.images,
            seconds=report.seconds,
            warm_images_per_s=report.warm_images_per_s,
            bad_images=len(report.bad_images),
            reused_parts=report.reused_parts,
        )
        left_out = f", left out {len(report.bad_images)}" if report.bad_images else ""
        self._reporter.line(
            f"           embedded {report.images} images{left_out} in {report.seconds:.0f} s"
        )

    def _test(self, epoch: int) -> None:
        cfg = self._config
        found = self._score(epoch, cfg.data.test_split)
        if (
            epoch == 0
            and cfg.evaluation.correlation_baseline
            and not self._folder.find("baseline", 0)
        ):
            baseline = score_gradient_correlation(cfg, self._dataset).of(cfg.protocol)
            self._folder.log("baseline", epoch=0, name="gradient correlation", **baseline)
        self._folder.log("evaluation", epoch=epoch, **found.of(cfg.protocol))
        self._reporter.line(f"           test {found.summary(cfg.protocol)}")

    def _validate(self, epoch: int, split: str) -> None:
        cfg = self._config
        found = self._score(epoch, split)
        self._folder.log("validation", epoch=epoch, **found.of(cfg.protocol))
        best = best_epoch(self._folder.records, cfg.evaluation.best_metric)
        self._folder.update(best=best)
        mark = " (the best so far)" if best["epoch"] == epoch else ""
        self._reporter.line(f"           {split} {found.summary(cfg.protocol)}{mark}")

    def _score(self, epoch: int, split: str) -> Score:
        uri, radii = self._embeddings(epoch), self._config.evaluation.radii_m
        return score_tables(self._dataset, split, uri, uri, stamp=self._stamp(epoch), radii_m=radii)

    def _log_round(self, epoch: int) -> None:
        if self._seconds:
            self._folder.log(
                "round", epoch=epoch, **{f"{name}_s": s for name, s in self._seconds.items()}
            )
        self._seconds = {}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started


def best_epoch(records: list[Record], metric: str) -> Record:
    """The epoch whose checkpoint is best on the validation split: the first with the highest metric."""
    scored = [record for record in records if record["kind"] == "validation"]
    best = max(scored, key=lambda record: (record[metric], -record["epoch"]))
    return {"epoch": best["epoch"], "metric": metric, "value": best[metric]}


def overlap(span: Span, waits: list[Span]) -> float:
    """The share of a time span in which nobody waited: 1 less what the waits, which follow each other, cover."""
    covered = sum(max(0.0, min(span[1], until) - max(span[0], since)) for since, until in waits)
    return 1 - covered / max(span[1] - span[0], 1e-9)
