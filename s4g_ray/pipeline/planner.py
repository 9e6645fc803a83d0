"""Planner: the batch plan of each epoch, in one pass or cell by cell, with gallery negatives."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from s4g_ray.data.schema import ProtocolName
from s4g_ray.data.tables.batch_plan import BatchPlan
from s4g_ray.data.tables.query_scores import read_query_scores
from s4g_ray.errors import InputError, RunError
from s4g_ray.pipeline.rounds.graphs import Collection, RunGraphs
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.sampling.cell_tasks import plan_cells_on_cluster
from s4g_ray.sampling.compact_graph import CompactGraph
from s4g_ray.sampling.gallery_negatives import choose_gallery
from s4g_ray.sampling.hard_positives import choose_hard_positives
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.storage.manifest import open_published


class Planner:
    """Plans the epochs of a run and saves the plans in its folder."""

    def __init__(self, graphs: RunGraphs, *, seed: int, protocol: ProtocolName) -> None:
        self._graphs = graphs
        self._split = graphs.split
        self._seed = seed
        self._protocol = protocol
        self._compact: dict[Collection, tuple[str, CompactGraph]] = {}  # the last one used

    def plan_uri(self, epoch: int) -> str:
        """Return where an epoch's plan lies."""
        return self._graphs.folder.path(f"plans/epoch={epoch:04d}.parquet")

    def plan_epoch(self, epoch: int, version: int | None, *, due: int | None) -> Record:
        """Build and save the plan of an epoch from a version of the graphs (None: without one).

        due: the version that the epoch was meant to use; another one was late.

        Returns the record of the plan: hardness, pairs left out, and the graph. Raises InputError
        when exclusions leave no batch, RunError when a graph is unpublished, altered or of another
        data set.
        """
        if version == 0:
            self._graphs.write_geographic()
        plan = self._plan_pairs(epoch, version)
        self._check_batches(plan)
        record: Record = {
            "hardness": plan.stats.hardness,
            "pairs_left_out": plan.stats.num_left_out,
            "cells": plan.stats.num_cells,
            "graph": _describe_graph(version),
            # epochs since it was mined; the geographic graph counts as of epoch 0
            "graph_age": None if version is None else epoch - 1 - version,
            "graph_late": int(version != due),
        }
        if version and self._graphs.sampling.hard_positives:
            plan, record["positives_repeated"] = self._prefer_hard(plan, epoch, version)
        if self._split.gallery is not None:
            plan, counts = self._add_gallery(plan, epoch, version)
            record.update(counts)
        plan.save(self.plan_uri(epoch), self._split.pairs, record=json.dumps(record))
        return record

    def _check_batches(self, plan: BatchPlan) -> None:
        if len(plan.batches):
            return
        exclusions = self._split.exclusions
        num_excluded = 0 if exclusions is None else exclusions.max_partners
        raise InputError(
            f"no batch of {self._graphs.batch_size} places can be built: exclusions keep a place"
            f" apart from up to {num_excluded} others; lower sampling.exclude_radius_m or"
            " train.batch_size"
        )

    def _plan_pairs(self, epoch: int, version: int | None) -> BatchPlan:
        pairs = self._split.pairs
        cfg = self._graphs.sampling
        options: dict[str, Any] = {
            "batch_size": self._graphs.batch_size,
            "num_hard_negatives": cfg.num_hard_negatives,
            "neighbor_pool_size": cfg.neighbor_pool_size,
            "seed": self._seed,
            "epoch": epoch,
            "protocol": self._protocol,
            "exclusions": self._split.exclusions,
        }
        if version is None:
            return plan_batches(pairs, None, **options)
        if len(pairs) > cfg.max_pairs_per_cell:
            return plan_cells_on_cluster(
                pairs,
                self._checked_uri(version),
                self._split.places,
                max_pairs_per_cell=cfg.max_pairs_per_cell,
                **options,
            )
        return plan_batches(pairs, self._read_compact(version), **options)

    def _prefer_hard(self, plan: BatchPlan, epoch: int, version: int) -> tuple[BatchPlan, int]:
        """Return the plan with hard queries in place of easy ones, and in how many slots."""
        chosen = choose_hard_positives(
            self._split.pairs,
            read_query_scores(self._checked_uri(version)),
            share=self._graphs.sampling.hard_positives,
            seed=self._seed,
            epoch=epoch,
        )
        batches = chosen[plan.batches]
        return replace(plan, batches=batches), int((batches != plan.batches).sum())

    def _add_gallery(
        self, plan: BatchPlan, epoch: int, version: int | None
    ) -> tuple[BatchPlan, Record]:
        """Return the plan with gallery negatives, and how many were mined, drawn and missing."""
        assert self._split.gallery is not None
        chosen, stats = choose_gallery(
            self._split.pairs.place_ids[plan.batches],
            None if version is None else self._read_compact(version, "gallery"),
            self._split.gallery,
            num=self._graphs.sampling.gallery_negatives,
            seed=self._seed,
            epoch=epoch,
            exclusions=self._split.exclusions,
        )
        counts = {
            "gallery_mined": stats.num_mined,
            "gallery_drawn": stats.num_drawn,
            "gallery_missing": stats.num_missing,
        }
        return replace(plan, gallery=chosen), counts

    def _read_compact(self, version: int, collection: Collection = "pairs") -> CompactGraph:
        """Read a graph in rows of its places; it is kept until another is asked for."""
        uri = self._checked_uri(version, collection)
        kept = self._compact.get(collection)
        if kept is not None and kept[0] == uri:
            return kept[1]
        del kept
        self._compact.pop(collection, None)  # frees the old one before the next is read
        among = None
        if collection == "gallery" and self._split.gallery is not None:
            among = self._split.gallery.places.ids
        width = self._graphs.width(collection)
        graph = CompactGraph.read(uri, self._split.places.ids, width, among=among)
        self._compact[collection] = (uri, graph)
        return graph

    def _checked_uri(self, version: int, collection: Collection = "pairs") -> str:
        """Return the URI of a graph of this data set; its checkpoint may be removed already."""
        uri = self._graphs.uri(version, collection)
        wanted = self._graphs.fingerprint
        manifest = open_published(uri, "neighbors")
        found = manifest.stamp.dataset if manifest.stamp else manifest.info.get("dataset")
        if found != wanted:
            raise RunError(
                f"{uri}: made of the data set {found!r}, but {wanted!r} is wanted; remove it and"
                " resume"
            )
        return uri


def _describe_graph(version: int | None) -> str:
    if version is None:
        return "none"
    if version == 0:
        return "geographic"
    return f"similarity v={version:04d}"
