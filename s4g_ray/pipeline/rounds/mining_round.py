"""MiningRound: embed a checkpoint, mine its graphs, score it. Finished steps are not repeated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import checkpoint_stamp
from s4g_ray.encoder.embedding.table_plan import fingerprint_places
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import RunError
from s4g_ray.evaluation.gradient_correlation import score_gradient_correlation
from s4g_ray.evaluation.scores import Score, score_tables
from s4g_ray.pipeline.rounds.graphs import RunGraphs
from s4g_ray.pipeline.rounds.miner import Miner
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run_folder import Record, RunFolder
from s4g_ray.progress import Reporter
from s4g_ray.storage.manifest import Stamp, is_published, open_published

Span = tuple[float, float]  # seconds since the epoch of time.time()


class MiningRound:
    """Does rounds, one at a time, for the coordinator.

    spans: filled with the time at which each round's mining began and ended, by epoch.
    """

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
        """Embed and mine an epoch's checkpoint; its evaluation's splits are embedded along."""
        began = time.time()
        share = self._graphs.share_of_round(epoch)
        evaluating = self._schedule.evaluates_after(epoch)
        self._embed(epoch, self._splits(True, evaluating), self._places_to_embed(share, epoch))
        self._pool.start_first()  # check_resources places shards after embedding actors
        embeddings = self._embeddings(epoch)
        with self._timed("mine"):
            for record in self._miner.mine(epoch, embeddings, self._stamp(epoch), share):
                if record["collection"] not in self._logged(epoch):
                    self._folder.log("mining", epoch=epoch, **record)
        self._spans[epoch] = (began, time.time())
        if not self.needs_evaluation(epoch):
            self._log_round(epoch)

    def evaluate(self, epoch: int) -> None:
        """Embed and score an epoch's checkpoint, on the test split and on the validation split."""
        val_split = self._config.data.val_split
        self._embed(epoch, self._splits(False, True), None)
        with self._timed("evaluate"), self._reporter.stage("evaluating"):
            if val_split is not None and not self._folder.find("validation", epoch):
                self._validate(epoch, val_split)
            self._test(epoch)
        self._log_round(epoch)

    def failed(self, what: str, epoch: int, attempt: int, error: RunError, last: bool) -> None:
        """Log a failed try."""
        self._seconds = {}
        if not last:
            then = "trying again"
        elif what == "mining" and self._schedule.overlaps:
            then = "training continues with the graph that is there"
        else:
            then = "given up"
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
        """Whether an epoch's evaluation is due, not done, and still possible."""
        due = self._schedule.evaluates_after(epoch) and not self._folder.find("evaluation", epoch)
        return due and is_published(self._folder.checkpoint(epoch))

    def needs_mining(self, epoch: int) -> bool:
        """Whether an epoch's mining is due, and its graphs are not all published and logged.

        Only graphs mined from the checkpoint that exists count.
        """
        if not self._schedule.mines_after(epoch):
            return False
        stamp = None
        if is_published(self._folder.checkpoint(epoch)):
            stamp = self._stamp(epoch)
        logged = self._logged(epoch)
        for collection in self._graphs.collections:
            if collection not in logged or not self._graphs.is_there(epoch, collection, stamp):
                return True
        return False

    def _logged(self, epoch: int) -> set[str]:
        return {record["collection"] for record in self._folder.find("mining", epoch)}

    def _embeddings(self, epoch: int) -> str:
        return self._folder.path(f"embeddings/v={epoch:04d}")

    def _stamp(self, epoch: int) -> Stamp:
        return checkpoint_stamp(
            self._config, self._encoder, self._folder.checkpoint(epoch), self._dataset.fingerprint
        )

    def _splits(self, mining: bool, evaluating: bool) -> list[str]:
        """Return the splits that a round embeds, each once."""
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

    def _places_to_embed(self, share: Ints | None, epoch: int) -> Ints | None:
        """Return the ids, ascending, of the places of the train split and gallery to embed.

        None: all. An evaluation needs the whole gallery.
        """
        gallery = self._graphs.split.gallery
        needs_gallery = (
            gallery is not None
            and "gallery" in self._config.sampling.gallery_splits
            and self._schedule.evaluates_after(epoch)
        )
        if share is None or not needs_gallery:
            return share
        assert gallery is not None
        return np.union1d(share, gallery.places.ids)

    def _embed(self, epoch: int, splits: list[str], only_places: Ints | None) -> None:
        """Embed some splits; of the train split and the gallery only some places (None: all)."""
        uri = self._embeddings(epoch)
        stamp = self._stamp(epoch)
        if is_published(uri):  # by an interrupted round, or by this round's mining
            found = open_published(uri, "embeddings")
            held = found.info.get("only_places")  # None: all
            wanted = fingerprint_places(only_places)
            is_mined = self._config.data.train_split in splits
            has_places = not is_mined or held in (None, wanted)
            if found.stamp == stamp and set(splits) <= set(found.info["splits"]) and has_places:
                return
        stage = f"embedding {' and '.join(splits)}"
        actors = count_noun(self._config.embedding.actors[0], "actor")
        waits = f"{actors} and the first images"
        with self._timed("embed"), self._reporter.stage(stage, waits) as update:
            report = embed(
                self._pool,
                self._config,
                self._dataset,
                self._folder.checkpoint(epoch),
                uri,
                splits=splits,
                numerics=self._numerics,
                stamp=stamp,
                only_places=only_places,
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
        images = count_noun(report.images, "image")
        self._reporter.record_line(
            f"           embedded {images}{left_out} in {report.seconds:.0f} s"
        )

    def _test(self, epoch: int) -> None:
        cfg = self._config
        found = self._score(epoch, cfg.data.test_split)
        wants_baseline = epoch == 0 and cfg.evaluation.correlation_baseline
        if wants_baseline and not self._folder.find("baseline", 0):
            baseline = score_gradient_correlation(
                self._dataset, cfg.data, radii_m=cfg.evaluation.radii_m, seed=cfg.seed
            ).for_protocol(cfg.protocol)
            self._folder.log("baseline", epoch=0, name="gradient correlation", **baseline)
        self._folder.log("evaluation", epoch=epoch, **found.for_protocol(cfg.protocol))
        self._reporter.record_line(f"           test {found.summary(cfg.protocol)}")

    def _validate(self, epoch: int, split: str) -> None:
        cfg = self._config
        found = self._score(epoch, split)
        self._folder.log("validation", epoch=epoch, **found.for_protocol(cfg.protocol))
        best = find_best(self._folder)
        assert best is not None  # this epoch's checkpoint is there
        self._folder.update(best=best)
        mark = " (the best so far)" if best["epoch"] == epoch else ""
        self._reporter.record_line(f"           {split} {found.summary(cfg.protocol)}{mark}")

    def _score(self, epoch: int, split: str) -> Score:
        uri = self._embeddings(epoch)
        cfg = self._config.evaluation
        return score_tables(
            self._dataset,
            split,
            uri,
            uri,
            stamp=self._stamp(epoch),
            radii_m=cfg.radii_m,
            sdm_ranks=cfg.sdm_ranks,
        )

    def _log_round(self, epoch: int) -> None:
        if self._seconds:
            durations = {f"{name}_s": seconds for name, seconds in self._seconds.items()}
            self._folder.log("round", epoch=epoch, **durations)
        self._seconds = {}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started


def find_best(folder: RunFolder) -> Record | None:
    """Return the best epoch of those whose checkpoint is there; None where none is validated.

    Where a run has branched, the best checkpoint before the branch may be removed.
    """
    there = [
        record
        for record in folder.records
        if record["kind"] == "validation" and is_published(folder.checkpoint(record["epoch"]))
    ]
    return best_epoch(there, folder.config.evaluation.best_metric) if there else None


def best_epoch(records: list[Record], metric: str) -> Record:
    """Return the epoch whose checkpoint is best on the validation split.

    Of equal metrics the earliest epoch is the best.
    """
    scored = [record for record in records if record["kind"] == "validation"]
    best = max(scored, key=lambda record: (record[metric], -record["epoch"]))
    return {"epoch": best["epoch"], "metric": metric, "value": best[metric]}


def overlap(span: Span, waits: list[Span]) -> float:
    """Return the share of a time span that no wait covers; waits do not overlap each other."""
    began, ended = span
    covered = sum(max(0.0, min(ended, until) - max(began, since)) for since, until in waits)
    return 1 - covered / max(ended - began, 1e-9)
