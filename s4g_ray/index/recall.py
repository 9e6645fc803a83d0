"""What a configuration makes of an index, and how hard that searches: recall@k against exact search decides."""

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
MAX_EF_SEARCH = 16_384  # that ef_search is raised to at most: 64 times where it begins


def plan_for(cfg: MiningConfig, num_vectors: int, dim: int) -> IndexPlan:
    """As plan_index, of what `mining` asks for."""
    return plan_index(
        num_vectors,
        dim,
        kind=cfg.index_kind,
        memory_gb=cfg.index_memory_gb,
        nprobe=cfg.nprobe,
        ef_search=cfg.ef_search,
        gpu=cfg.gpus_per_shard > 0,
    )


def is_as_asked(info: Mapping[str, Any], cfg: MiningConfig) -> bool:
    """Whether a version, by its manifest, is one that `mining` as it is now would make.

    That is: of so many shards, of that plan, at the effort that is set, and with recall that suffices.
    """
    plan = IndexPlan(**info["plan"])
    try:
        same = (
            plan == plan_for(cfg, plan.num_vectors, plan.dim)
            and info["num_shards"] == cfg.num_shards
        )
    except ValueError:  # it cannot be built any more, and building it says why
        return False
    effort, most = effort_range(plan, cfg)
    fits = info["effort"] == effort or (most is not None and info["effort"] <= most)
    return same and fits and (info["recall"] is None or info["recall"] >= cfg.min_recall)


def recall_of(found: Ints, exact: Ints, scores: Floats32) -> float:
    """recall@k of found[M, k] against exact[M, k + 1] with scores (or [M, k] where there are no more vectors).

    What scores as the next one after the k does not count: of equal vectors (blank tiles) any are right.
    """
    k = found.shape[1]
    counted = np.ones((len(exact), k), dtype=bool)
    if exact.shape[1] > k:
        counted = scores[:, :k] > scores[:, k:] + TIE
    shared = [
        np.isin(truth[:k][of], row).sum()
        for row, truth, of in zip(found, exact, counted, strict=True)
    ]
    return float(np.sum(shared) / max(counted.sum(), 1)) if counted.any() else 1.0


def raise_effort(
    recall_at: Callable[[int | None], float], effort: int | None, most: int | None, wanted: float
) -> tuple[float, int | None]:
    """Double the effort until recall is as wanted or effort is `most`: recall and effort in the end.

    effort None: there is nothing to raise; most None: it is not to be raised.
    """
    recall = recall_at(effort)
    while recall < wanted and effort is not None and most is not None and effort < most:
        effort = min(2 * effort, most)
        recall = recall_at(effort)
    return recall, effort


def effort_range(plan: IndexPlan, cfg: MiningConfig) -> tuple[int | None, int | None]:
    """The effort (nprobe, ef_search) to begin with, and the most there is; none where it is not to be raised."""
    if plan.kind in IVF_KINDS:
        most = min(plan.num_lists, GPU_MAX_NPROBE) if cfg.gpus_per_shard else plan.num_lists
        return plan.nprobe, most if cfg.nprobe is None else None
    if plan.kind == "hnsw":
        most = min(
            math.ceil(plan.num_vectors / cfg.num_shards), MAX_EF_SEARCH
        )  # a shard has no more to offer
        return plan.ef_search, most if cfg.ef_search is None else None
    return None, None


def check_recall(
    recall: float, effort: int | None, plan: IndexPlan, cfg: MiningConfig, k: int
) -> None:
    """Raises RunError for recall@k below mining.min_recall, with what can be done."""
    if recall >= cfg.min_recall:
        return
    key = "nprobe" if plan.kind in IVF_KINDS else "ef_search"
    remedy = (
        "set mining.index_kind to a more exact kind (flat is exact), or raise mining.index_memory_gb"
        if effort is None or getattr(cfg, key) is None
        else f"raise mining.{key}, or leave it out: it is then raised as far as needed"
    )
    at = f" at {key}={effort}" if effort is not None else ""
    raise RunError(
        f"recall@{k} of the {plan.kind} index{at} is {recall:.3f}, below mining.min_recall={cfg.min_recall:g}; {remedy}"
    )
