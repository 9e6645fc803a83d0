"""Measure the kinds of index on clustered vectors: memory, build time, recall@128 and queries/s.

    python -m benchmarks.index_kinds [--count 1000000] [--dim 256] [--queries 2000] [--threads 2]

Vectors are a mixture of Gaussian clusters of about 64 vectors, whose centres lie in a subspace of
24 dimensions, so that a query's neighbors fill several clusters; they are drawn in blocks from a
seed. Queries are drawn from the same mixture. Recall is against exact search. Approximate kinds are
measured with several search efforts (nprobe or ef_search). Building and searching use the same
--threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.record import Cell, Measured, Meter, apart, record
from s4g_ray.index.plan import IVF_KINDS, IndexPlan, Kind, lists_for, plan_index
from s4g_ray.index.recall import measure_recall
from s4g_ray.index.top_k import Found
from s4g_ray.index.vector_index import VectorIndex

K = 128
BLOCK = 65_536
CLUSTER = 64  # vectors of a cluster
SUBSPACE = 24  # dimensions of the subspace of the centres
SPREAD = 0.4  # standard deviation of a cluster, where that of the centres is 1
NPROBES = (8, 32, 128)
EF_SEARCHES = (128, 512)
HNSW_SHARE = 10  # hnsw holds 1 in 10 of the vectors: a graph of all takes minutes to build


def draw_mixture(count: int, dim: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """Draw blocks of vectors around centres that are the same for any seed."""
    shared = np.random.default_rng(0)
    centres = shared.standard_normal((max(1, count // CLUSTER), SUBSPACE), dtype=np.float32)
    directions = shared.standard_normal((SUBSPACE, dim), dtype=np.float32)
    centres = centres @ directions / np.float32(SUBSPACE**0.5)
    for start in range(0, count, BLOCK):
        rng = np.random.default_rng((seed, start))
        rows = min(BLOCK, count - start)
        vectors = rng.standard_normal((rows, dim), dtype=np.float32)
        vectors *= SPREAD
        vectors += centres[rng.integers(0, len(centres), rows)]
        yield vectors


def draw_sample(count: int, dim: int, seed: int, size: int) -> NDArray[np.float32]:
    """Return the first `size` vectors of a mixture, which are in random order."""
    blocks: list[NDArray[np.float32]] = []
    missing = size
    for block in draw_mixture(count, dim, seed):
        blocks.append(block[:missing])
        missing -= len(blocks[-1])
        if not missing:
            break
    return np.concatenate(blocks)


def build(plan: IndexPlan, threads: int) -> VectorIndex:
    """Train and fill an index, block by block."""
    template = VectorIndex.template(
        plan, draw_sample(plan.num_vectors, plan.dim, 1, plan.train_size)
    )
    index = VectorIndex.empty(plan, template, num_threads=threads)
    for number, block in enumerate(draw_mixture(plan.num_vectors, plan.dim, 1)):
        index.add(block, np.arange(len(block)) + number * BLOCK)
    index.seal()
    return index


def measure(plan: IndexPlan, num_queries: int, threads: int, exact: Found | None) -> dict[str, Any]:
    """Build one kind and search it with each search effort; runs in a process of its own."""
    from s4g_ray.index.faiss_library import set_num_threads

    set_num_threads(threads)
    meter = Meter()
    queries = draw_sample(plan.num_vectors, plan.dim, 2, num_queries)
    built = meter(build, plan, threads)
    index: VectorIndex = built.value
    index.search(queries[:64], K)  # the first search compiles, or measures engines
    rows: list[list[Cell]] = []
    found: Found = (np.empty(0, np.int64), np.empty(0, np.float32))
    for effort in search_efforts(plan):
        if effort is not None:
            index.effort = effort
        searched: Measured = meter(index.search, queries, K)
        found = searched.value
        recall = 1.0 if exact is None else measure_recall(found[0], *exact).mean
        bits = f" {plan.bits} bit" if plan.bits else ""
        rows.append(
            [
                plan.kind + bits,
                plan.num_vectors,
                "" if effort is None else effort,
                round(plan.memory_gb, 3),
                round(built.extra_gb, 3),
                round(built.seconds, 1),
                round(recall, 4),
                round(num_queries / searched.seconds),
            ]
        )
    return {"rows": rows, "found": found}


def search_efforts(plan: IndexPlan) -> list[int | None]:
    """Return nprobe or ef_search of each search; None for exact kinds."""
    if plan.is_exact:
        return [None]
    if plan.kind in IVF_KINDS:
        return [min(nprobe, plan.num_lists) for nprobe in NPROBES]
    return list(EF_SEARCHES)


def plan_kinds(count: int, dim: int) -> list[IndexPlan]:
    """Plan every kind; hnsw on a tenth of the vectors, after flat on the same tenth."""
    kinds: tuple[Kind, ...] = ("flat", "sqfp16", "ivf_sq8", "ivf_rabitq")
    whole = [plan_index(count, dim, kind=kind) for kind in kinds]
    one_bit = plan_index(count, dim, kind="ivf_rabitq", memory_gb=whole[-1].memory_gb * 0.99)
    small = [
        plan_index(count // HNSW_SHARE, dim, kind="flat"),
        plan_index(count // HNSW_SHARE, dim, kind="hnsw"),
    ]
    return [*whole, one_bit, *small]


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows: list[list[Cell]] = []
    exact: Found | None = None
    for plan in plan_kinds(options.count, options.dim):
        reference = None if plan.kind == "flat" else exact
        result = apart(measure, plan, options.queries, options.threads, reference)
        if plan.kind == "flat":
            exact = result["found"]
        rows.extend(result["rows"])
        print(*result["rows"], sep="\n", flush=True)
    record(
        "index_kinds",
        title=f"Kinds of index on clustered vectors, D = {options.dim}",
        text=(
            "memory as planned and as seen while building, build time with training, recall@128"
            " against exact search."
        ),
        command=f"python -m benchmarks.index_kinds --count {options.count} --dim {options.dim}",
        columns=[
            "kind",
            "vectors",
            "nprobe or ef",
            "planned GB",
            "seen GB",
            "build s",
            "recall@128",
            "queries/s",
        ],
        rows=rows,
        config={**vars(options), "k": K, "spread": SPREAD, "lists": lists_for(options.count)},
        order=60,
    )


if __name__ == "__main__":
    main()
