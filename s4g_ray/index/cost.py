"""Estimate how long an index takes to build and to search on this machine.

Measures rates for a few seconds and multiplies them by counted work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from s4g_ray.arrays import Floats32
from s4g_ray.index.approximate_search import ApproximateStore, nearest_lists, train
from s4g_ray.index.exact_search import measure_engines, unit_rows
from s4g_ray.index.faiss_library import faiss, set_num_threads
from s4g_ray.index.plan import IVF_KINDS, IndexPlan

SAMPLE = 4096  # vectors that rates are measured with
PROBES = 256  # queries
COARSE = 1024  # centroids
SUBSPACE = 24  # dimensions of the subspace that the sample lies near
NOISE = 0.4  # standard deviation that is added in all directions
KMEANS_ROUNDS = 10  # of faiss for IVF
MEASURE_S = 0.4  # time to measure each rate


@dataclass(frozen=True)
class Rates:
    """Seconds that a unit of work takes with all threads; 0 where a kind has no such work."""

    num_threads: int
    product: float  # a floating-point operation of exact search with top-k, or of finding a list
    row: float = 0  # adding a vector: normalise and copy it, encode it or link it into a graph
    code: float = 0  # comparing a query with one code of a list
    walk: float = 0  # one query in a graph of SAMPLE vectors
    engine: str = ""  # of exact search


@dataclass(frozen=True)
class Cost:
    """Seconds of shards that work at the same time, each with the threads that were measured."""

    train_s: float  # once, for all shards
    build_s: float  # training, and adding a shard's vectors
    search_s: float
    queries_per_s: float


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
    store = _make_store(plan, vectors)
    row = _time_once(lambda: store.add(vectors)) / (SAMPLE * math.log2(SAMPLE))
    walk = _shortest(lambda: store.search(vectors[:PROBES], 1, threads)) / PROBES
    return Rates(threads, 0, row=row, walk=walk)


def expected_cost(plan: IndexPlan, rates: Rates, *, num_queries: int, num_shards: int) -> Cost:
    """Estimate build and search times: counted work times measured rates.

    Exact: 2 M N D operations. IVF: k-means of KMEANS_ROUNDS x 2 S L D operations, 2 L D to find a
    vector's or a query's lists, then nprobe of L lists of codes. HNSW: work a vector and a query
    grows with log N.
    """
    rows = math.ceil(plan.num_vectors / num_shards)
    train_s = 0.0
    if plan.is_exact:
        add_s = rows * rates.row
        query_s = 2.0 * rows * plan.dim * rates.product
    elif plan.kind in IVF_KINDS:
        assign_s = 2.0 * plan.num_lists * plan.dim * rates.product
        train_s = KMEANS_ROUNDS * plan.train_size * assign_s
        add_s = rows * (assign_s + rates.row)
        query_s = assign_s + rows * plan.nprobe / plan.num_lists * rates.code
    else:
        add_s = rows * math.log2(max(rows, 2)) * rates.row
        query_s = rates.walk * math.log2(max(rows, 2)) / math.log2(SAMPLE)
    return Cost(train_s, train_s + add_s, num_queries * query_s, 1 / query_s)


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
    store = _make_store(small, vectors)
    add_s = _time_once(lambda: store.add(vectors)) / SAMPLE
    row = max(add_s - 2.0 * num_lists * plan.dim * product, 0.0)
    code = _shortest(lambda: store.search(vectors[:PROBES], 16, num_threads)) / (PROBES * SAMPLE)
    return Rates(num_threads, product, row=row, code=code)


def _make_store(plan: IndexPlan, vectors: Floats32) -> ApproximateStore:
    return ApproximateStore.from_bytes(train(plan, vectors[: SAMPLE // 4]), plan)


def _time_once(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _shortest(work: Callable[[], Any]) -> float:
    """Repeat work for MEASURE_S and return the shortest time: other processes slow some runs."""
    until = time.perf_counter() + MEASURE_S
    shortest = _time_once(work)
    while time.perf_counter() < until:
        shortest = min(shortest, _time_once(work))
    return shortest
