"""Estimate how long an index takes to build and to search: counted work times rates.

Pure arithmetic: does not import FAISS. rates.py measures the rates of a machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s4g_ray.index.plan import IndexPlan

WALK_ROWS = 4096  # vectors of the graph that `Rates.walk` counts
KMEANS_ROUNDS = 10  # of faiss for IVF
# Rates that are taken where none are measured: those of an EPYC with two threads, while other
# processes shared its two cores, per thread and rounded up. Exact search: 22 GFLOP/s, and 15 ns
# to select among the scores.
PRODUCT = 4.5e-11
SELECT = 15e-9
CODE = {"ivf_sq8": 2.5e-10, "ivf_rabitq": 2.5e-10}  # of each value
LEAST_CODE = 5e-8  # of a code, however short
ROW = {"flat": 5e-9, "sqfp16": 5e-9, "ivf_sq8": 1e-8, "ivf_rabitq": 8e-7, "hnsw": 1e-7}
WALK = 2e-6  # of each value of a query
WALK_START = 2e-4  # of a query, however short
# of a GPU: 10 TFLOP/s, and codes at 500 GB/s; both below what an A100's data sheet has
GPU_PRODUCT = 1e-13
GPU_CODE = 2e-12  # of each value


@dataclass(frozen=True)
class Rates:
    """Seconds that a unit of work takes with all threads; 0 where a kind has no such work."""

    num_threads: int
    product: float  # a floating-point operation of exact search with top-k, or of finding a list
    row: float = 0  # adding a vector: normalise and copy it, encode it or link it into a graph
    code: float = 0  # comparing a query with one code of a list
    walk: float = 0  # one query in a graph of WALK_ROWS vectors
    engine: str = ""  # of exact search


@dataclass(frozen=True)
class Cost:
    """Seconds of shards that work at the same time, each with the threads that were measured."""

    train_s: float  # once, for all shards
    build_s: float  # training, and adding a shard's vectors
    search_s: float
    queries_per_s: float


def recorded_rates(kind: str, dim: int, num_threads: int, *, gpu: bool = False) -> Rates:
    """Return cautious rates of a kind for vectors of `dim` values, without measuring any."""
    product = (PRODUCT + SELECT / (2 * dim)) / num_threads
    code = max(CODE.get(kind, 0) * dim, LEAST_CODE) / num_threads if kind in CODE else 0
    if gpu:
        product = GPU_PRODUCT
        code = GPU_CODE * dim if kind in CODE else 0
    row = ROW[kind] * dim / num_threads
    if kind != "hnsw":
        return Rates(num_threads, product, row=row, code=code)
    return Rates(num_threads, 0, row=row, walk=(WALK * dim + WALK_START) / num_threads)


def expected_cost(plan: IndexPlan, rates: Rates, *, num_queries: int) -> Cost:
    """Estimate build and search times of the plan's shards: counted work times rates.

    Exact: 2 M N D operations. IVF: k-means of KMEANS_ROUNDS x 2 S L D operations, 2 L D to find a
    vector's or a query's lists, then nprobe of L lists of codes. HNSW: work a vector and a query
    grows with log N.
    """
    rows = math.ceil(plan.num_vectors / plan.num_shards)
    train_s = 0.0
    if plan.is_exact:
        add_s = rows * rates.row
        query_s = 2.0 * rows * plan.dim * rates.product
    elif plan.num_lists:
        assign_s = 2.0 * plan.num_lists * plan.dim * rates.product
        train_s = KMEANS_ROUNDS * plan.train_size * assign_s
        add_s = rows * (assign_s + rates.row)
        query_s = assign_s + rows * plan.nprobe / plan.num_lists * rates.code
    else:
        add_s = rows * math.log2(max(rows, 2)) * rates.row
        query_s = rates.walk * math.log2(max(rows, 2)) / math.log2(WALK_ROWS)
    return Cost(train_s, train_s + add_s, num_queries * query_s, 1 / query_s)
