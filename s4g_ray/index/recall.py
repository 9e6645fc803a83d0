"""Measure recall@k with its uncertainty, and raise an index's search effort until it suffices.

The search effort is the part of an approximate index that a query visits: nprobe lists of an IVF
index, ef_search candidates of an HNSW graph. A higher effort finds more and takes longer; exact
kinds have none (None).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Floats64, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.errors import RunError
from s4g_ray.index.plan import GPU_KINDS, GPU_MAX_NPROBE, IVF_KINDS, IndexPlan

TIE = 1e-6  # between scores in float32
MAX_EF_SEARCH = 16_384  # the highest ef_search that is tried: 64 times the first
Z = 1.96  # standard deviations of a 95 % confidence interval


@dataclass(frozen=True)
class RecallEstimate:
    """Recall@k of a sample of queries, and its 95 % confidence interval for all queries.

    The interval holds for queries that are drawn uniformly. JSON by `dataclasses.asdict`.
    """

    mean: float
    low: float
    high: float
    num_queries: int  # that have results to find
    by_region: Mapping[str, RecallEstimate] = field(default_factory=dict)


def measure_recall(
    found: Ints, exact: Ints, scores: Floats32, regions: NDArray[Any] | None = None
) -> RecallEstimate:
    """Estimate recall@k of found[M, k] against exact[M, k + 1] and its scores[M, k + 1].

    exact and scores are [M, k] where there are no more vectors. Results that score as the first
    one after the k best do not count: among equal vectors (blank tiles) any is right. regions[M]:
    the name of each query's region, for by_region. A query without results that count is left out.
    """
    k = found.shape[1]
    counted = np.ones((len(exact), k), dtype=bool)
    if exact.shape[1] > k:
        counted = scores[:, :k] > scores[:, k:] + TIE
    num_shared = np.zeros(len(exact), np.int64)
    for row in range(len(exact)):
        num_shared[row] = np.isin(exact[row, :k][counted[row]], found[row]).sum()
    num_counted = counted.sum(axis=1)
    by_region = {}
    for region in np.unique(regions).tolist() if regions is not None else []:
        chosen = regions == region
        by_region[str(region)] = _estimate(num_shared[chosen], num_counted[chosen])
    whole = _estimate(num_shared, num_counted)
    return RecallEstimate(whole.mean, whole.low, whole.high, whole.num_queries, by_region)


def _estimate(num_shared: Ints, num_counted: Ints) -> RecallEstimate:
    """Estimate the mean recall of queries: num_shared[M] of num_counted[M] results are found.

    The interval is that of Agresti and Coull (The American Statistician 52, 1998), for shares in
    place of zeros and ones: Z^2 / 2 queries of recall 1 and as many of recall 0 are added. So it
    has a width where all queries of the sample have the same recall, too.
    """
    judged = num_counted > 0
    recalls: Floats64 = num_shared[judged] / num_counted[judged]
    count = len(recalls)
    if not count:
        return RecallEstimate(1.0, 0.0, 1.0, 0)
    mean = float(recalls.mean())
    added = Z**2 / 2
    total = count + 2 * added
    centre = (float(recalls.sum()) + added) / total
    squares = float(((recalls - centre) ** 2).sum()) + added * ((1 - centre) ** 2 + centre**2)
    reach = Z * math.sqrt(squares / total) / math.sqrt(total)
    low = max(0.0, min(centre - reach, mean))
    high = min(1.0, max(centre + reach, mean))
    return RecallEstimate(mean, low, high, count)


def raise_effort(
    recall_at: Callable[[int | None], RecallEstimate],
    effort: int | None,
    max_effort: int | None,
    min_recall: float,
) -> tuple[RecallEstimate, int | None]:
    """Double the search effort until recall_at(effort) reaches min_recall or effort max_effort.

    Returns the last recall and effort. effort None: there is nothing to raise; max_effort None: it
    must not be raised.
    """
    recall = recall_at(effort)
    while recall.mean < min_recall and effort is not None and max_effort is not None:
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
        shard_size = math.ceil(plan.num_vectors / plan.num_shards)  # a shard finds no more
        return plan.ef_search, min(shard_size, MAX_EF_SEARCH)
    return None, None


def check_recall(
    recall: RecallEstimate, effort: int | None, plan: IndexPlan, cfg: MiningConfig, k: int
) -> None:
    """Raise RunError, with the remedy, for recall@k below mining.min_recall."""
    if recall.mean >= cfg.min_recall:
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
        f"recall@{k} of the {plan.kind} index{at_effort} is {recall.mean:.3f}"
        f" ({recall.low:.3f} to {recall.high:.3f} by {recall.num_queries} queries), below"
        f" mining.min_recall={cfg.min_recall:g}; {remedy}"
    )


def matches_config(info: Mapping[str, Any], cfg: MiningConfig) -> bool:
    """Return whether a version with this manifest info is one that `mining` allows, as it is now.

    Compares what the configuration sets: kind, shards, memory limit, search effort and recall.
    Choices that it leaves open (auto) stay as the version has them, because room and rates may
    have changed since.
    """
    plan = IndexPlan(**info["plan"])
    if cfg.index_kind not in ("auto", plan.kind):
        return False
    if cfg.num_shards not in ("auto", plan.num_shards):
        return False
    if cfg.index_memory_gb is not None and plan.memory_gb > cfg.index_memory_gb:
        return False
    if cfg.gpus_per_shard and plan.kind not in GPU_KINDS:
        return False
    if not _matches_effort(info["effort"], plan, cfg):
        return False
    return info["recall"] is None or info["recall"] >= cfg.min_recall


def _matches_effort(effort: int | None, plan: IndexPlan, cfg: MiningConfig) -> bool:
    """Return whether a version's effort is what the configuration sets; True where it sets none."""
    if plan.kind == "hnsw":
        return cfg.ef_search is None or effort == cfg.ef_search
    if plan.kind not in IVF_KINDS:
        return True
    limit = min(plan.num_lists, GPU_MAX_NPROBE) if cfg.gpus_per_shard else plan.num_lists
    if cfg.nprobe is None:
        return effort is not None and effort <= limit
    return effort == min(cfg.nprobe, limit)
