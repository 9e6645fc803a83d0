"""How long an index takes to build and to search: rates of this machine, measured in seconds, times counted work."""

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

SAMPLE, PROBES, COARSE = (
    4096,
    256,
    1024,
)  # vectors, queries and centroids that rates are measured with
SUBSPACE, NOISE = 24, 0.4  # dimensions of the sample; what is added in all directions
KMEANS_ROUNDS = 10  # faiss's for IVF
MEASURE_S = 0.4  # for each rate


@dataclass(frozen=True)
class Rates:
    """Seconds that a unit of work takes, all threads together; 0 where a kind has none of it."""

    num_threads: int
    product: float  # one floating-point operation of exact search, top-k included, or of assigning to centroids
    row: float = 0  # taking one vector in: normalising and copying, encoding into a list, or linking into a graph
    code: float = 0  # comparing a query with one code of a list
    walk: float = 0  # one query in a graph of SAMPLE vectors
    engine: str = ""  # of exact search


@dataclass(frozen=True)
class Cost:
    """Seconds of shards that work at the same time, each with the threads that were measured."""

    train_s: float  # once, for all shards
    build_s: float  # training, and taking in a shard's vectors
    search_s: float
    queries_per_s: float


def measure_rates(plan: IndexPlan, num_threads: int) -> Rates:
    """Measure what a plan needs on this machine, on vectors of its D near a subspace: 1 to 4 seconds.

    Embeddings lie near one too; RaBitQ and graphs take several times as long where all directions are alike.
    """
    rng = np.random.default_rng(0)
    vectors = (
        rng.standard_normal((SAMPLE, SUBSPACE))
        @ rng.standard_normal((SUBSPACE, plan.dim))
        / SUBSPACE**0.5
    )
    vectors = unit_rows(vectors + NOISE * rng.standard_normal(vectors.shape))
    threads = set_num_threads(num_threads)
    if plan.exact:
        engine, product = min(measure_engines(plan.dim, threads).items(), key=lambda item: item[1])
        return Rates(
            threads, product, row=_best(lambda: unit_rows(vectors)) / SAMPLE, engine=engine
        )
    if plan.kind in IVF_KINDS:
        return _list_rates(plan, vectors, threads)
    store = _store(plan, vectors)
    row = _timed(lambda: store.add(vectors)) / (SAMPLE * math.log2(SAMPLE))
    walk = _best(lambda: store.search(vectors[:PROBES], 1, threads)) / PROBES
    return Rates(threads, 0, row=row, walk=walk)


def expected_cost(plan: IndexPlan, rates: Rates, *, num_queries: int, num_shards: int) -> Cost:
    """Extrapolate by counted work.

    Exact: 2 M N D operations. IVF: k-means of KMEANS_ROUNDS x 2 S L D operations, 2 L D to find a vector's or a
    query's lists, then nprobe of L lists of codes. HNSW: work a vector and a query grows with log N.
    """
    rows = math.ceil(plan.num_vectors / num_shards)
    if plan.exact:
        train_s, add_s = 0.0, rows * rates.row
        query_s = 2.0 * rows * plan.dim * rates.product
    elif plan.kind in IVF_KINDS:
        assign_s = 2.0 * plan.num_lists * plan.dim * rates.product
        train_s = KMEANS_ROUNDS * plan.train_size * assign_s
        add_s = rows * (assign_s + rates.row)
        query_s = assign_s + rows * plan.nprobe / plan.num_lists * rates.code
    else:
        train_s, add_s = 0.0, rows * math.log2(max(rows, 2)) * rates.row
        query_s = rates.walk * math.log2(max(rows, 2)) / math.log2(SAMPLE)
    return Cost(train_s, train_s + add_s, num_queries * query_s, 1 / query_s)


def _list_rates(plan: IndexPlan, vectors: Floats32, num_threads: int) -> Rates:
    centroids = faiss.IndexFlatIP(plan.dim)
    centroids.add(vectors[:COARSE])
    assign_s = _best(lambda: nearest_lists(centroids, vectors, 1))
    product = assign_s / (2.0 * SAMPLE * COARSE * plan.dim)
    lists = 16
    small = IndexPlan(
        plan.kind,
        SAMPLE,
        plan.dim,
        num_lists=lists,
        nprobe=lists,
        bits=plan.bits,
        train_size=SAMPLE,
    )
    store = _store(small, vectors)
    row = _timed(lambda: store.add(vectors)) / SAMPLE - 2.0 * lists * plan.dim * product
    code = _best(lambda: store.search(vectors[:PROBES], 16, num_threads)) / (PROBES * SAMPLE)
    return Rates(num_threads, product, row=max(row, 0.0), code=code)


def _store(plan: IndexPlan, vectors: Floats32) -> ApproximateStore:
    return ApproximateStore.from_bytes(train(plan, vectors[: SAMPLE // 4]), plan)


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _best(work: Callable[[], Any]) -> float:
    """The shortest of the runs that MEASURE_S has room for: others share the machine."""
    until, shortest = time.perf_counter() + MEASURE_S, _timed(work)
    while time.perf_counter() < until:
        shortest = min(shortest, _timed(work))
    return shortest
