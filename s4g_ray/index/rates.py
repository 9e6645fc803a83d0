"""Measure, in a few seconds, the rates at which this machine builds and searches an index.

cost.py multiplies them by counted work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from s4g_ray.arrays import Floats32
from s4g_ray.config.schema import MiningConfig
from s4g_ray.index.cost import WALK_ROWS, Rates, recorded_rates
from s4g_ray.index.exact_search import measure_engines, unit_rows
from s4g_ray.index.faiss_library import faiss, set_num_threads
from s4g_ray.index.plan import IVF_KINDS, IndexPlan
from s4g_ray.index.stores.hnsw import HnswStore
from s4g_ray.index.stores.ivf import IvfStore
from s4g_ray.index.stores.ivf_training import nearest_lists, train_lists
from s4g_ray.index.stores.store import Scope

SAMPLE = WALK_ROWS  # vectors that rates are measured with
PROBES = 256  # queries
COARSE = 1024  # centroids
SUBSPACE = 24  # dimensions of the subspace that the sample lies near
NOISE = 0.4  # standard deviation that is added in all directions
MEASURE_S = 0.4  # time to measure each rate


def rates_for(plan: IndexPlan, mining: MiningConfig) -> Rates:
    """Measure the rates of a plan here; recorded ones where shards use GPUs."""
    threads = mining.index_threads
    if mining.gpus_per_shard:
        return recorded_rates(plan.kind, plan.dim, threads, gpu=True)
    return measure_rates(plan, threads)


def measure_rates(plan: IndexPlan, num_threads: int) -> Rates:
    """Measure the rates that a plan needs on this machine: 1 to 4 seconds.

    The vectors have the plan's D and lie near a subspace, as embeddings do; RaBitQ and graphs take
    several times as long where all directions are alike.
    """
    vectors = _sample_vectors(plan.dim)
    threads = set_num_threads(num_threads)
    if plan.is_exact:
        engine, product = min(measure_engines(plan.dim, threads).items(), key=lambda item: item[1])
        row = _shortest(lambda: unit_rows(vectors)) / SAMPLE
        return Rates(threads, product, row=row, engine=engine)
    if plan.kind in IVF_KINDS:
        return _measure_lists(plan, vectors, threads)
    store = HnswStore.empty(plan)
    row = _time_once(lambda: store.add(vectors)) / (SAMPLE * math.log2(SAMPLE))
    scope = Scope(np.arange(SAMPLE), num_threads=threads)
    walk = _shortest(lambda: store.search(vectors[:PROBES], 1, plan.ef_search, scope)) / PROBES
    return Rates(threads, 0, row=row, walk=walk)


def _sample_vectors(dim: int) -> Floats32:
    """Draw unit vectors[SAMPLE, dim] near a subspace of SUBSPACE dimensions."""
    rng = np.random.default_rng(0)
    positions = rng.standard_normal((SAMPLE, SUBSPACE))
    directions = rng.standard_normal((SUBSPACE, dim))
    vectors = positions @ directions / SUBSPACE**0.5
    return unit_rows(vectors + NOISE * rng.standard_normal(vectors.shape))


def _measure_lists(plan: IndexPlan, vectors: Floats32, num_threads: int) -> Rates:
    """Measure the rates of an IVF plan: products with centroids, encoding, comparing codes."""
    centroids = faiss.IndexFlatIP(plan.dim)
    centroids.add(vectors[:COARSE])
    assign_s = _shortest(lambda: nearest_lists(centroids, vectors, 1))
    product = assign_s / (2.0 * SAMPLE * COARSE * plan.dim)
    num_lists = 16
    small = IndexPlan(
        plan.kind,
        SAMPLE,
        plan.dim,
        num_lists=num_lists,
        nprobe=num_lists,
        bits=plan.bits,
        train_size=SAMPLE,
    )
    store = IvfStore.from_bytes(train_lists(small, vectors[: SAMPLE // 4]), num_lists)
    add_s = _time_once(lambda: store.add(vectors)) / SAMPLE
    row = max(add_s - 2.0 * num_lists * plan.dim * product, 0.0)
    scope = Scope(np.arange(SAMPLE), num_threads=num_threads)
    search_s = _shortest(lambda: store.search(vectors[:PROBES], 16, num_lists, scope))
    code = search_s / (PROBES * SAMPLE)
    return Rates(num_threads, product, row=row, code=code)


def _time_once(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _shortest(work: Callable[[], Any]) -> float:
    return shortest_time(work, MEASURE_S)


def shortest_time(work: Callable[[], Any], seconds: float) -> float:
    """Repeat work for some seconds and return its shortest time: other processes slow some runs."""
    until = time.perf_counter() + seconds
    shortest = _time_once(work)
    while time.perf_counter() < until:
        shortest = min(shortest, _time_once(work))
    return shortest
