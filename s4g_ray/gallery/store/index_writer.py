"""Write the index of a version: held by one process, or by the shards of a Ray cluster.

mining.num_shards above 1, or an index that does not fit this machine, makes shards where a cluster
is connected or named. A changed index stays where the one before is, until it is planned anew, by
the settings that the gallery was built with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from s4g_ray.arrays import Floats32, Floats64, Ints, spread_rows
from s4g_ray.config.schema import RunConfig
from s4g_ray.distributed.session import ray_session
from s4g_ray.distributed.start_checks import find_address, is_connected
from s4g_ray.errors import InputError
from s4g_ray.gallery.store.index_facts import IndexFacts
from s4g_ray.gallery.store.vectors import (
    QUERIES,
    RECALL_K,
    build_index,
    load_index,
    plan_gallery_index,
)
from s4g_ray.gallery.store.versions import Version
from s4g_ray.index.plan import IndexPlan, plan_for
from s4g_ray.index.sharded.planning import find_resources
from s4g_ray.index.sharded.requests import Coordinates
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.index.sharded.versions import version_folder
from s4g_ray.index.shared.shard_files import ShardChange, change_shards
from s4g_ray.index.shared.shared_index import find_memory_gb
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.progress import Reporter
from s4g_ray.storage.manifest import open_published

GROWTH = 2.0  # times the tiles that an index was planned for, from which it is planned anew
# of section mining, that choose the kind and the place of an index
SETTINGS = ("index_kind", "index_memory_gb", "nprobe", "ef_search", "min_recall", "num_shards")


def plan_one_process(config: RunConfig, num_tiles: int, dim: int) -> IndexPlan | None:
    """Plan the index of one process; None where shards are to hold it.

    Raises InputError where one process is asked for, or no cluster is known, and it does not fit.
    """
    cfg = config.mining
    if cfg.num_shards not in ("auto", 1):
        return None
    try:
        return plan_gallery_index(cfg, num_tiles, dim)
    except InputError:
        if cfg.num_shards == 1 or not (is_connected() or find_address(config.ray)):
            raise
        return None


@contextmanager
def index_cluster(config: RunConfig, num_tiles: int, dim: int) -> Iterator[None]:
    """Check that the index has room before anything is written; connect to Ray where it is needed.

    Raises InputError for an index that fits neither this machine nor the cluster.
    """
    if plan_one_process(config, num_tiles, dim) is not None:
        yield
        return
    with ray_session(config.ray, config.storage) as nodes:
        room = find_resources(config.mining, nodes)
        try:
            plan_for(config.mining, num_tiles, dim, room, num_queries=QUERIES)
        except ValueError as error:
            raise InputError(f"the index of {num_tiles:,} tiles finds no room: {error}") from error
        yield


class IndexWriter:
    """Writes the index of one version into `folder`.

    read: embeddings of rows of tiles -> vectors[n, D].
    """

    def __init__(
        self,
        config: RunConfig,
        folder: str,
        number: int,
        dim: int,
        read: Callable[[pa.Table], Floats32],
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._folder = folder
        self._number = number
        self._dim = dim
        self._read = read
        self._reporter = reporter

    def build(self, rows: pa.Table, table: str) -> IndexFacts:
        """Build the index of all tiles, rows by ascending id; table: of their embeddings alone.

        Raises InputError as plan_one_process, and RunError as IndexService.build.
        """
        if plan_one_process(self._config, len(rows), self._dim) is None:
            return self._build_shards(rows, table)
        vectors = self._read(rows)
        index, recall = build_index(
            self._config.mining, vectors, rows["id"].to_numpy(), positions_of(rows)
        )
        return self._save(index, recall)

    def change(self, old: Version, rows: pa.Table, removed: Ints) -> IndexFacts:
        """Write the index of a version with other tiles: rows, by ascending id, put or replaced.

        removed: ids, ascending. Changes shards one after the other, in this process.
        """
        if old.facts.is_sharded:
            return self._change_shards(old, rows, removed)
        index = load_index(old.index_folder)
        if len(removed):
            index.remove(removed)
        if len(rows):
            index.replace(self._read(rows), rows["id"].to_numpy(), positions_of(rows))
        facts = self._save(index, old.facts.recall)
        return dataclasses.replace(facts, planned_tiles=old.facts.planned_tiles)

    def _save(self, index: VectorIndex, recall: float | None) -> IndexFacts:
        index.save(self._folder)
        return IndexFacts(
            kind=index.kind,
            is_sharded=False,
            num_shards=1,
            shard_gb=index.plan.memory_gb,
            memory_gb=index.plan.memory_gb,
            planned_tiles=index.plan.num_vectors,
            effort=index.effort,
            recall=recall,
        )

    def _build_shards(self, rows: pa.Table, table: str) -> IndexFacts:
        ids = rows["id"].to_numpy()
        coordinates = Coordinates(ids, rows["lat"].to_numpy(), rows["lon"].to_numpy())
        cfg = self._config.mining
        chosen = spread_rows(len(rows), cfg.recall_sample, seed=1)
        sample = self._read(rows.take(pa.array(chosen)))
        with ray_session(self._config.ray, self._config.storage):
            service = IndexService(
                cfg,
                self._folder,
                num_vectors=len(rows),
                dim=self._dim,
                num_queries=QUERIES,
                start_timeout_s=self._config.ray.start_timeout_s,
            )
            with service:
                report = service.build(
                    self._number,
                    table,
                    sample=sample,
                    coordinates=coordinates,
                    k=min(RECALL_K, len(rows)),
                )
        self._reporter.line(f"index: {report.describe()}")
        is_exact = report.effort is None
        return IndexFacts(
            kind=report.kind,
            is_sharded=True,
            num_shards=report.num_shards,
            shard_gb=self._find_shard_gb(),
            memory_gb=report.memory_gb,
            planned_tiles=len(rows),
            effort=report.effort,
            recall=None if is_exact else report.recall,
        )

    def _change_shards(self, old: Version, rows: pa.Table, removed: Ints) -> IndexFacts:
        change = ShardChange(
            removed=removed,
            ids=rows["id"].to_numpy(),
            vectors=self._read(rows),
            coordinates=positions_of(rows),
        )
        source = version_folder(old.index_folder, old.number)
        target = version_folder(self._folder, self._number)
        with self._reporter.stage("changing shards") as update:
            info = change_shards(source, target, change, update)
        memory_gb = float(info["memory_gb"])
        return dataclasses.replace(old.facts, memory_gb=memory_gb, shard_gb=self._find_shard_gb())

    def _find_shard_gb(self) -> float:
        """Return the memory of a shard of the version that was written."""
        return find_memory_gb(open_published(version_folder(self._folder, self._number), "index"))


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the SETTINGS that differ from their defaults, as JSON has them."""
    asked = config.mining.model_dump(mode="json", include=set(SETTINGS), exclude_defaults=True)
    return {name: asked[name] for name in SETTINGS if name in asked}


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings of settings_of as overrides of a configuration."""
    return [f"mining.{name}={json.dumps(value)}" for name, value in settings.items()]


def needs_new_plan(old: Version, num_tiles: int) -> bool:
    """Return whether a gallery has grown far beyond what its index was planned and trained for."""
    return num_tiles > GROWTH * old.facts.planned_tiles


def positions_of(rows: pa.Table) -> Floats64:
    """Return lat and lon [N, 2]."""
    return np.stack([rows["lat"].to_numpy(), rows["lon"].to_numpy()], axis=1)
