"""Train in one process, without Ray, and measure what was learned at equal steps.

The parts are those of a run: the sampler, the loader, the training step, the filters of mining and
the metrics. What Ray adds - several workers, jobs, shards - does not change a run's results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import load_view
from s4g_ray.data.pair_loader import PairLoader
from s4g_ray.data.tables.batch_plan import BatchPlan
from s4g_ray.data.tables.embedding_table import EmbeddingTable
from s4g_ray.data.tables.neighbor_graph import NeighborGraph, join_graphs
from s4g_ray.data.tables.query_scores import QueryScores
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.evaluation.metrics import retrieval_metrics
from s4g_ray.index.exact_search import unit_rows
from s4g_ray.mining.candidates import (
    Filters,
    Kept,
    References,
    Widths,
    find_neighbors,
    merge_neighbors,
)
from s4g_ray.mining.cells.cell_plan import CellPlan
from s4g_ray.mining.positive_scores import score_own_places
from s4g_ray.pipeline.rounds.cell_search import ExactReferences
from s4g_ray.pipeline.rounds.graphs import gallery_width
from s4g_ray.pipeline.rounds.schedule import GEOGRAPHIC, Schedule
from s4g_ray.sampling.compact_graph import CompactGraph
from s4g_ray.sampling.gallery_negatives import choose_gallery
from s4g_ray.sampling.geographic_neighbors import geographic_graph, nearest_places
from s4g_ray.sampling.hard_positives import choose_hard_positives
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.training.step import TrainingStep, step_seed

MEASURED = ("recall@1", "recall@5", "recall@10", "median_error_m")
TRAIN_QUERIES = 1000  # that recall on the train split is measured with
EMBEDDED_AT_ONCE = 250


@dataclass
class Curve:
    """What a training measured: the metrics of the test split after so many steps, and more."""

    steps: list[int] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    # recall@1 of train queries among all train references, with their own augmentation-free images
    train_recall: list[float] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)  # mean since the last point
    hardness: list[float] = field(default_factory=list)  # of each epoch's plan
    cpu_s: float = 0.0

    def record(self) -> dict[str, Any]:
        """Return the curve as it is kept, with four digits."""
        rounded: dict[str, Any] = asdict(self)
        rounded["metrics"] = [
            {name: round(float(point[name]), 4) for name in MEASURED} for point in self.metrics
        ]
        for name in ("train_recall", "loss", "hardness"):
            values = rounded[name]
            rounded[name] = [None if value is None else round(value, 4) for value in values]
        rounded["cpu_s"] = round(self.cpu_s)
        return rounded


class LearningRun:
    """A training of a fixed number of steps on one core, measured `num_points` times.

    Raises ValueError where train.epochs have fewer steps.
    """

    def __init__(self, config: RunConfig, num_steps: int, num_points: int) -> None:
        self.config = config
        self.num_steps = num_steps
        self.point_every = num_steps // num_points
        self.dataset: GeoDataset = open_dataset(config.data.uri)
        self.split = TrainSplit.read(config, self.dataset)
        per_epoch = len(self.split.pairs) // config.train.batch_size
        self._require_steps(per_epoch * config.train.epochs)
        self.encoder = Encoder.build(config.model, seed=config.seed)
        self.numerics = Numerics("fp32", channels_last=True)
        self.step = TrainingStep(
            self.encoder,
            self.numerics,
            config.train,
            torch.device("cpu"),
            decay_norms=config.decays_norms,
        )
        self.schedule = Schedule(config)
        self.graphs: dict[int, CompactGraph] = {}
        self.gallery_graphs: dict[int, CompactGraph] = {}
        self.query_scores: dict[int, QueryScores] = {}
        self.curve = Curve()
        self._losses: list[float] = []
        self._done = 0

    def run(self) -> Curve:
        """Train all steps and return what was measured."""
        started = time.process_time()
        self._measure()
        with self._open_loader() as loader:
            for epoch in range(1, self.config.train.epochs + 1):
                self._train_epoch(loader, epoch)
                if self._done == self.num_steps:
                    break
                if self.schedule.mines_after(epoch):
                    self.mine(epoch)
        self._require_steps(self._done)  # plans may have left pairs out
        self.curve.cpu_s = time.process_time() - started
        return self.curve

    def _require_steps(self, most: int) -> None:
        if self.num_steps > most:
            raise ValueError(
                f"{self.config.train.epochs} epochs have {most} steps, but {self.num_steps} are"
                " asked for; raise train.epochs"
            )

    def _open_loader(self) -> PairLoader:
        cfg = self.config
        splits = {cfg.data.train_split}
        if cfg.sampling.gallery_negatives:
            splits.update(cfg.sampling.gallery_splits)
        return PairLoader(
            self.dataset.table("queries", [cfg.data.train_split]),
            self.dataset.table("references", sorted(splits)),
            cfg.data,
            cfg.augmentation,
            seed=cfg.seed,
            with_ground=cfg.train.soft_labels > 0,
        )

    def _train_epoch(self, loader: PairLoader, epoch: int) -> None:
        """Train on an epoch's plan, until the last step of the run at most."""
        plan = self._plan(epoch)
        self.curve.hardness.append(plan.stats.hardness)
        pairs = self.split.pairs
        batches = loader.load(
            pairs.query_ids[plan.batches],
            pairs.reference_ids[plan.batches],
            epoch=epoch,
            gallery_ids=plan.gallery,
        )
        for batch in batches:
            result = self.step.step(
                batch,
                seed=step_seed(self.config.seed, epoch, batch.number, 0),
                position=(self._done + 0.5) / self.num_steps * self.config.train.epochs,
            )
            self._losses.append(float(result.loss))
            self._done += 1
            if self._done % self.point_every == 0:
                self._measure()
            if self._done == self.num_steps:
                return

    def _plan(self, epoch: int) -> BatchPlan:
        cfg = self.config
        version = self.schedule.version_for(epoch)
        graph = None if version is None else self._graph(version)
        plan = plan_batches(
            self.split.pairs,
            graph,
            batch_size=cfg.train.batch_size,
            num_hard_negatives=cfg.sampling.num_hard_negatives,
            neighbor_pool_size=cfg.sampling.neighbor_pool_size,
            seed=cfg.seed,
            epoch=epoch,
            protocol=cfg.protocol,
            exclusions=self.split.exclusions,
        )
        if version in self.query_scores and cfg.sampling.hard_positives:
            plan = self._prefer_hard(plan, epoch, self.query_scores[version])
        if self.split.gallery is None:
            return plan
        gallery, _ = choose_gallery(
            self.split.pairs.place_ids[plan.batches],
            None if version is None else self.gallery_graphs[version],
            self.split.gallery,
            num=cfg.sampling.gallery_negatives,
            seed=cfg.seed,
            epoch=epoch,
            exclusions=self.split.exclusions,
        )
        return BatchPlan(plan.batches, plan.stats, gallery)

    def _prefer_hard(self, plan: BatchPlan, epoch: int, scores: QueryScores) -> BatchPlan:
        chosen = choose_hard_positives(
            self.split.pairs,
            scores,
            share=self.config.sampling.hard_positives,
            seed=self.config.seed,
            epoch=epoch,
        )
        return BatchPlan(chosen[plan.batches], plan.stats)

    def _graph(self, version: int) -> CompactGraph:
        """Return the graph of a version; the geographic one is made when it is first used."""
        if version == GEOGRAPHIC and GEOGRAPHIC not in self.graphs:
            split = self.split
            k = self.config.sampling.neighbor_pool_size
            self._keep(GEOGRAPHIC, geographic_graph(split.places, k, split.exclusions))
            if split.gallery is not None:
                near = nearest_places(
                    split.places, split.gallery.places, self._gallery_k, split.exclusions
                )
                self._keep_gallery(GEOGRAPHIC, near)
        return self.graphs[version]

    @property
    def _gallery_k(self) -> int:
        assert self.split.gallery is not None
        wanted = gallery_width(self.config.sampling, self.config.train.batch_size)
        return min(wanted, len(self.split.gallery.places))

    def _keep(self, version: int, graph: NeighborGraph) -> None:
        width = self.config.sampling.neighbor_pool_size
        self.graphs[version] = CompactGraph.from_graph(graph, self.split.places.ids, width)

    def _keep_gallery(self, version: int, graph: NeighborGraph) -> None:
        assert self.split.gallery is not None
        self.gallery_graphs[version] = CompactGraph.from_graph(
            graph, self.split.places.ids, self._gallery_k, among=self.split.gallery.places.ids
        )

    def mine(self, epoch: int) -> None:
        """Find each place's neighbors by the encoder as it is now."""
        split = self.split
        table = self.dataset.table("queries", [self.config.data.train_split])
        own = table.place_ids
        queries = self.embed(table, "queries")
        found, vectors = self._embed_references([split.name], split.reference_ids)
        k = min(self.config.sampling.neighbor_pool_size, len(split.places))
        self._keep(epoch, self._find(queries, own, vectors, found, k, epoch))
        self.query_scores[epoch] = score_own_places(
            EmbeddingTable(table.ids, own, queries),
            EmbeddingTable(found.ids, found.places, vectors),
        )
        if split.gallery is None:
            return
        splits = self.config.sampling.gallery_splits
        found, vectors = self._embed_references(splits, split.gallery.ids)
        graph = self._find(queries, own, vectors, found, self._gallery_k, epoch)
        self._keep_gallery(epoch, graph)

    def _embed_references(self, splits: Sequence[str], wanted: Ints) -> tuple[References, Floats32]:
        """Embed the references of some splits whose ids are wanted, by ascending id."""
        table = self.dataset.table("references", list(splits))
        rows = np.flatnonzero(np.isin(table.ids, wanted))
        rows = rows[np.argsort(table.ids[rows])]
        found = References(table.ids[rows], table.place_ids[rows])
        return found, self.embed(table, "references", rows)

    def _find(
        self,
        queries: Floats32,
        own: Ints,
        vectors: Floats32,
        references: References,
        k: int,
        epoch: int,
    ) -> NeighborGraph:
        cfg = self.config.mining
        filters = Filters.from_config(cfg, k, self.split.exclusions)
        if cfg.scope == "global":
            kept = find(queries, own, vectors, references, filters, cfg.max_candidates)
            return merge_neighbors(own, kept.neighbors, kept.scores, k)
        graphs = []
        seed = (self.config.seed, epoch)
        mined = np.unique(own)
        plan = CellPlan.from_places(self.split.places, mined, references, cfg, k, seed)
        cells = plan.cells_of(own)
        for cell, rows in candidates_of_cells(plan, references.places, np.unique(cells)):
            asking = np.flatnonzero(cells == cell)
            among = References(references.ids[rows], references.places[rows])
            kept = find(
                queries[asking], own[asking], vectors[rows], among, filters, cfg.max_candidates
            )
            graphs.append(merge_neighbors(own[asking], kept.neighbors, kept.scores, k))
        return join_graphs(graphs)

    def embed(self, table: ImageTable, view: View, rows: Ints | None = None) -> Floats32:
        """Embed the images of a table, or of some rows [n] of it -> [n, D], of length 1."""
        rows = np.arange(len(table)) if rows is None else rows
        self.encoder.eval()
        found = []
        for start in range(0, len(rows), EMBEDDED_AT_ONCE):
            chosen = rows[start : start + EMBEDDED_AT_ONCE].tolist()
            seed = self.config.seed
            images = [load_view(table, row, view, self.config.data, seed=seed) for row in chosen]
            with torch.inference_mode():
                embedded = self.numerics.embed(self.encoder, torch.stack(images), view)
            found.append(embedded.float().numpy())
        self.encoder.train()
        return unit_rows(np.concatenate(found))

    def _measure(self) -> None:
        """Add a point to the curve."""
        cfg = self.config.data
        queries = self.dataset.table("queries", [cfg.test_split])
        references = self.dataset.table("references", [cfg.test_split])
        metrics = retrieval_metrics(
            self.embed(queries, "queries"),
            self.embed(references, "references"),
            queries.place_ids,
            references.place_ids,
            query_latlon=np.stack([queries.lat, queries.lon], axis=1),
            reference_latlon=np.stack([references.lat, references.lon], axis=1),
        )
        self.curve.steps.append(self._done)
        self.curve.metrics.append({name: float(metrics[name]) for name in MEASURED})
        self.curve.train_recall.append(self._measure_train())
        self.curve.loss.append(float(np.mean(self._losses)) if self._losses else None)
        self._losses.clear()

    def _measure_train(self) -> float:
        cfg = self.config.data
        queries = self.dataset.table("queries", [cfg.train_split])
        references = self.dataset.table("references", [cfg.train_split])
        count = min(TRAIN_QUERIES, len(queries))
        rows = np.sort(np.random.default_rng(0).permutation(len(queries))[:count])
        metrics = retrieval_metrics(
            self.embed(queries, "queries", rows),
            self.embed(references, "references"),
            queries.place_ids[rows],
            references.place_ids,
        )
        return float(metrics["recall@1"])


def find(
    queries: Floats32,
    own: Ints,
    vectors: Floats32,
    references: References,
    filters: Filters,
    max_candidates: int,
) -> Kept:
    """Search references exactly for the neighbors of queries[M, D] of places own[M]."""
    search_references = ExactReferences("torch", 1).open(vectors, references.ids)
    widths = Widths.from_references(references, filters, max_candidates)
    return find_neighbors(search_references, queries, own, references, filters, widths, block=1000)


def candidates_of_cells(
    plan: CellPlan, reference_places: Ints, cells: Ints
) -> Iterator[tuple[int, Ints]]:
    """Yield each cell with the rows of its candidates: of cells around it, and some of anywhere."""
    cell_of = plan.cells_of(reference_places)
    for cell in cells.tolist():
        block = int(np.searchsorted(plan.first_cells, cell, side="right")) - 1
        is_candidate = np.isin(cell_of, plan.cells.around(np.array([cell])))
        is_candidate[plan.far_rows_of(block)] = True
        yield cell, np.flatnonzero(is_candidate)
