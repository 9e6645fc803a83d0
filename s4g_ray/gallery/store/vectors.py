"""Plan and build the index that one process holds, and read embeddings by id."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from s4g_ray.arrays import Floats32, Floats64, Ints, Rows32, spread_rows
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.tables.embedding_table import (
    EmbeddingTable,
    open_embeddings,
    read_groups,
    read_part_head,
)
from s4g_ray.errors import InputError, RunError
from s4g_ray.index.plan import EXACT_KINDS, IndexPlan, Resources, plan_for
from s4g_ray.index.recall import RecallEstimate, effort_range, measure_recall, raise_effort
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files

QUERIES = 10_000  # that a gallery's index answers within mining.max_search_hours
RECALL_K = 10
GROUPS_AT_ONCE = 32  # row groups that are in memory together
SHARE_OF_MEMORY = 0.8  # of what is free on this machine


def plan_gallery_index(cfg: MiningConfig, num_tiles: int, dim: int) -> IndexPlan:
    """Choose the kind of an index that one process holds.

    Raises InputError, with the arithmetic, where none fits the free memory of this machine or
    mining.index_memory_gb.
    """
    free_gb = SHARE_OF_MEMORY * available_memory_gb()
    room = Resources((free_gb,), (float(os.cpu_count() or 1),))
    one = cfg.model_copy(update={"num_shards": 1, "gpus_per_shard": 0.0})
    try:
        return plan_for(one, num_tiles, dim, room, num_queries=QUERIES)
    except ValueError as error:
        raise InputError(
            f"the index of {num_tiles:,} tiles does not fit in {free_gb:.3g} GB of this machine:"
            f" {error}; name a Ray cluster by ray.address or RAY_ADDRESS, which then holds it in"
            " shards, or use a machine with more memory or an encoder with a lower"
            " model.embedding_dim"
        ) from error


def available_memory_gb() -> float:
    """Return the memory that is free on this machine, in GB."""
    path = Path("/proc/meminfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def build_index(
    cfg: MiningConfig, vectors: Floats32, ids: Ints, coordinates: Floats64
) -> tuple[VectorIndex, float | None]:
    """Index vectors[N, D] with lat and lon [N, 2] -> index, recall@10 (None: it is exact).

    The search effort is raised until the recall reaches mining.min_recall. Raises InputError as
    plan_gallery_index does.
    """
    plan = plan_gallery_index(cfg, len(vectors), vectors.shape[1])
    template = None
    if plan.train_size:
        rows = spread_rows(len(vectors), plan.train_size, seed=0)
        template = VectorIndex.template(plan, vectors[rows])
    index = VectorIndex.empty(plan, template, num_threads=os.cpu_count())
    index.add(vectors, ids, coordinates)
    index.seal()
    return index, _fit_recall(index, plan, cfg, vectors, ids)


def _fit_recall(
    index: VectorIndex, plan: IndexPlan, cfg: MiningConfig, vectors: Floats32, ids: Ints
) -> float | None:
    """Raise the effort as far as needed; return the recall@10 of a sample of the tiles."""
    if plan.kind in EXACT_KINDS:
        return None
    queries = vectors[spread_rows(len(vectors), cfg.recall_sample, seed=1)]
    k = min(RECALL_K, len(vectors))
    exact_plan = dataclasses.replace(plan, kind="flat", num_lists=0, nprobe=0, bits=0, links=0)
    exact = VectorIndex.empty(exact_plan)
    exact.add(vectors, ids)
    exact_ids, exact_scores = exact.search(queries, min(k + 1, len(vectors)))

    def recall_at(effort: int | None) -> RecallEstimate:
        found, _ = index.search_padded(queries, k, effort=effort)
        return measure_recall(found, exact_ids, exact_scores)

    first, highest = effort_range(plan, cfg)
    recall, effort = raise_effort(recall_at, first, highest, cfg.min_recall)
    if effort is not None:
        index.effort = effort
    return recall.mean


def read_vectors(
    gallery: str, tables: Mapping[int, str], segments: Ints | Rows32, ids: Ints, dim: int
) -> Floats32:
    """Read the embeddings of ids[n] -> vectors[n, D]; segments[n]: the version of each.

    tables: the embedding table of each version, relative to the gallery. Reads the row groups that
    hold them. Raises KeyError for an id that is not in its segment.
    """
    vectors = np.zeros((len(ids), dim), np.float32)
    for number in np.unique(segments).tolist():
        rows = np.flatnonzero(segments == number)
        order = rows[np.argsort(ids[rows])]
        wanted = ids[order]
        is_found = np.zeros(len(wanted), bool)
        for table in _tables_with(files.join(gallery, tables[number]), wanted):
            places = rows_of(wanted, table.ids)
            held = places >= 0
            vectors[order[places[held]]] = table.vectors[held]
            is_found[places[held]] = True
        if not is_found.all():
            raise KeyError(int(wanted[~is_found][0]))
    return vectors


def _tables_with(folder: str, wanted: Ints) -> Iterator[EmbeddingTable]:
    """Yield the row groups of a table that hold some of wanted[n], ascending."""
    for part in open_embeddings(folder, "references").parts:
        head = read_part_head(folder, part)
        starts = np.cumsum([0, *head.group_rows])
        hits = np.flatnonzero(rows_of(wanted, head.ids) >= 0)
        groups = np.unique(np.searchsorted(starts, hits, side="right") - 1)
        for first in range(0, len(groups), GROUPS_AT_ONCE):
            yield from read_groups(folder, part, groups[first : first + GROUPS_AT_ONCE].tolist())


def read_embedded_ids(folder: str) -> Ints:
    """Read the ids of an embedding table of references, ascending."""
    parts = open_embeddings(folder, "references").parts
    ids: Ints = np.sort(np.concatenate([read_part_head(folder, part).ids for part in parts]))
    return ids


def load_index(folder: str, num_threads: int | None = None) -> VectorIndex:
    """Read the index of a version. Raises RunError for one without coordinates."""
    index = VectorIndex.load(folder, num_threads=num_threads)
    if not index.has_coordinates:
        raise RunError(f"{folder} has no coordinates; build the gallery again")
    return index
