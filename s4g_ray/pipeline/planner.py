"""The batch plans of a run: from its graphs, in one pass or cell by cell, with gallery negatives beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.batch_plan import BatchPlan
from s4g_ray.errors import InputError, RunError
from s4g_ray.pipeline.rounds.graphs import Collection, RunGraphs
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.sampling.cell_tasks import plan_cells_on_cluster
from s4g_ray.sampling.compact_graph import CompactGraph
from s4g_ray.sampling.gallery_negatives import choose_gallery
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.storage.manifest import open_published


class Planner:
    """Plans the epochs of a run and saves the plans in its folder."""

    def __init__(self, graphs: RunGraphs) -> None:
        self.graphs, self.config = graphs, graphs.config
        self.pairs: PairTable = graphs.dataset.pairs(graphs.config.data.train_split)
        self._read: dict[
            Collection, tuple[str, CompactGraph]
        ] = {}  # the graphs that were used last

    def plan_uri(self, epoch: int) -> str:
        """Where an epoch's plan lies."""
        return self.graphs.folder.path(f"plans/epoch={epoch:04d}.parquet")

    def plan_epoch(self, epoch: int, version: int | None, *, due: int | None) -> Record:
        """Build and save the plan of an epoch from a version of the graphs; what became of the pairs.

        due: the version that the epoch was to use, had it not been late.

        Raises InputError when exclusions leave no batch, RunError when a graph is unpublished, altered or of another
        data set.
        """
        if version == 0:
            self.graphs.write_geographic()
        plan = self._pairs_plan(epoch, version)
        if not len(plan.batches):
            most = self.graphs.exclusions.max_partners if self.graphs.exclusions else 0
            raise InputError(
                f"no batch of {self.config.train.batch_size} places can be built: each place may not meet up to"
                f" {most} others; lower sampling.exclude_radius_m or train.batch_size"
            )
        record: Record = {
            "hardness": plan.stats.hardness,
            "pairs_left_out": plan.stats.num_left_out,
            "cells": plan.stats.num_cells,
            "graph": "none"
            if version is None
            else f"similarity v={version:04d}"
            if version
            else "geographic",
            # epochs since it was mined; the geographic graph counts as of epoch 0
            "graph_age": None if version is None else epoch - 1 - version,
            "graph_late": int(version != due),
        }
        if self.graphs.gallery is not None:
            plan, more = self._with_gallery(plan, epoch, version)
            record.update(more)
        plan.save(self.plan_uri(epoch), self.pairs, record=json.dumps(record))
        return record

    def _pairs_plan(self, epoch: int, version: int | None) -> BatchPlan:
        cfg, graphs = self.config.sampling, self.graphs
        options: dict[str, Any] = {
            "batch_size": self.config.train.batch_size,
            "num_hard_negatives": cfg.num_hard_negatives,
            "neighbor_pool_size": cfg.neighbor_pool_size,
            "seed": self.config.seed,
            "epoch": epoch,
            "protocol": self.config.protocol,
            "exclusions": graphs.exclusions,
        }
        if version is None:
            return plan_batches(self.pairs, None, **options)
        if len(self.pairs) > cfg.max_pairs_per_cell:
            return plan_cells_on_cluster(
                self.pairs,
                self._graph(version),
                graphs.places,
                max_pairs_per_cell=cfg.max_pairs_per_cell,
                **options,
            )
        return plan_batches(self.pairs, self._rows(version), **options)

    def _with_gallery(
        self, plan: BatchPlan, epoch: int, version: int | None
    ) -> tuple[BatchPlan, Record]:
        graphs = self.graphs
        assert graphs.gallery is not None
        chosen, stats = choose_gallery(
            self.pairs.place_ids[plan.batches],
            None if version is None else self._rows(version, "gallery"),
            graphs.gallery,
            num=self.config.sampling.gallery_negatives,
            seed=self.config.seed,
            epoch=epoch,
            exclusions=graphs.exclusions,
        )
        counts = {"mined": stats.num_mined, "drawn": stats.num_drawn, "missing": stats.num_missing}
        return replace(plan, gallery=chosen), {
            f"gallery_{name}": count for name, count in counts.items()
        }

    def _rows(self, version: int, collection: Collection = "pairs") -> CompactGraph:
        """A graph in rows of its places, kept until another is used."""
        graphs, uri = self.graphs, self._graph(version, collection)
        if self._read.get(collection, ("", None))[0] != uri:
            self._read.pop(collection, None)  # before the next is read
            gallery = graphs.gallery if collection == "gallery" else None
            among = None if gallery is None else gallery.places.ids
            rows = CompactGraph.read(uri, graphs.places.ids, graphs.width(collection), among=among)
            self._read[collection] = uri, rows
        return self._read[collection][1]

    def _graph(self, version: int, collection: Collection = "pairs") -> str:
        """The URI of a graph; the checkpoint that it was mined from may be gone, but the data set must be the same."""
        uri, wanted = self.graphs.uri(version, collection), self.graphs.dataset.fingerprint
        manifest = open_published(uri, "neighbors")
        found = manifest.stamp.dataset if manifest.stamp else manifest.info.get("dataset")
        if found != wanted:
            raise RunError(
                f"{uri}: made of the data set {found!r}, but {wanted!r} is wanted; remove it and resume"
            )
        return uri
