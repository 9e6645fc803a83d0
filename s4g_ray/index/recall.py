"""Plan an index as the configuration asks, and raise its search effort until recall@k suffices.

The search effort is the part of an approximate index that a query visits: nprobe lists of an IVF
index, ef_search candidates of an HNSW graph. A higher effort finds more and takes longer; exact
kinds have none (None).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.errors import RunError
from s4g_ray.index.plan import GPU_MAX_NPROBE, IVF_KINDS, IndexPlan, plan_index

TIE = 1e-6  # between scores in float32
MAX_EF_SEARCH = 16_384  # the highest ef_search that is tried: 64 times the first


def plan_for(cfg: MiningConfig, num_vectors: int, dim: int) -> IndexPlan:
    """Plan the index that the configuration's `mining` section asks for, as plan_index does."""
    return plan_index(
        num_vectors,
        dim,
        kind=cfg.index_kind,
        memory_gb=cfg.index_memory_gb,
        nprobe=cfg.nprobe,
        ef_search=cfg.ef_search,
        gpu=cfg.gpus_per_shard > 0,
    )


def matches_config(info: Mapping[str, Any], cfg: MiningConfig) -> bool:
    """Return whether `mining`, as it is now, would build a version with this manifest info.

    Compares the number of shards, the plan, the search effort where it is set, and the recall.
    """
    plan = IndexPlan(**info["plan"])
    try:
        wanted = plan_for(cfg, plan.num_vectors, plan.dim)
    except ValueError:  # cannot be built any more; building it reports why
        return False
    if plan != wanted or info["num_shards"] != cfg.num_shards:
        return False
    effort, max_effort = effort_range(plan, cfg)
    is_raised = max_effort is not None and info["effort"] <= max_effort
    if info["effort"] != effort and not is_raised:
        return False
    return info["recall"] is None or info["recall"] >= cfg.min_recall


def measure_recall(found: Ints, exact: Ints, scores: Floats32) -> float:
    """Return recall@k of found[M, k] against exact[M, k + 1] and its scores[M, k + 1].

    exact and scores are [M, k] where there are no more vectors. Results that score as the first
    one after the k best do not count: among equal vectors (blank tiles) any is right.
    """
    k = found.shape[1]
    counted = np.ones((len(exact), k), dtype=bool)
    if exact.shape[1] > k:
        counted = scores[:, :k] > scores[:, k:] + TIE
    if not counted.any():
        return 1.0
    num_shared = 0
    for found_row, exact_row, counts in zip(found, exact, counted, strict=True):
        num_shared += int(np.isin(exact_row[:k][counts], found_row).sum())
    return num_shared / int(counted.sum())


def raise_effort(
    recall_at: Callable[[int | None], float],
    effort: int | None,
    max_effort: int | None,
    min_recall: float,
) -> tuple[float, int | None]:
    """Double the search effort until recall_at(effort) reaches min_recall or effort max_effort.

    Returns the last recall and effort. effort None: there is nothing to raise; max_effort None: it
    must not be raised.
    """
    recall = recall_at(effort)
    while recall < min_recall and effort is not None and max_effort is not None:
        if effort >= max_effort:
            break
        effort = min(2 * effort, max_effort)
        recall = recall_at(effort)
    return recall, effort


def effort_range(plan: IndexPlan, cfg: MiningConfig) -> tuple[int | None, int | None]:
    """Return the first and the highest search effort (nprobe or ef_search).

    The highest is None where the configuration sets the effort; both are None for exact kinds.
    """
    if plan.kind in IVF_KINDS:
        if cfg.nprobe is not None:
            return plan.nprobe, None
        if cfg.gpus_per_shard:
            return plan.nprobe, min(plan.num_lists, GPU_MAX_NPROBE)
        return plan.nprobe, plan.num_lists
    if plan.kind == "hnsw":
        if cfg.ef_search is not None:
            return plan.ef_search, None
        shard_size = math.ceil(plan.num_vectors / cfg.num_shards)  # a shard finds no more
        return plan.ef_search, min(shard_size, MAX_EF_SEARCH)
    return None, None


def check_recall(
    recall: float, effort: int | None, plan: IndexPlan, cfg: MiningConfig, k: int
) -> None:
    """Raise RunError, with the remedy, for recall@k below mining.min_recall."""
    if recall >= cfg.min_recall:
        return
    key = "nprobe" if plan.kind in IVF_KINDS else "ef_search"
    if effort is None or getattr(cfg, key) is None:
        remedy = (
            "set mining.index_kind to a more exact kind (flat is exact), or raise"
            " mining.index_memory_gb"
        )
    else:
        remedy = f"raise mining.{key}, or leave it out: it is then raised as far as needed"
    at_effort = f" at {key}={effort}" if effort is not None else ""
    raise RunError(
        f"recall@{k} of the {plan.kind} index{at_effort} is {recall:.3f}, below"
        f" mining.min_recall={cfg.min_recall:g}; {remedy}"
    )
