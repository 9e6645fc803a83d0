"""Measure the index service against the same index in process: batches of 1,000 queries.

    python -m benchmarks.service [--counts 10000 100000] [--dim 1024] [--repeats 7]

Two shards of one thread each against one index of two threads, with the same engine of exact
search. Each repeat searches both in turns, the service as one caller that waits for each answer and
as two callers (mining searches from mining.num_searchers tasks). The smallest collection shows the
cost of the calls.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from benchmarks.support.record import Cell, record
from s4g_ray.config.schema import MiningConfig
from s4g_ray.index.exact_search import unit_rows
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage import files
from s4g_ray.storage.manifest import publish, write_part

K = 128
BATCH = 1000
PART_ROWS = 4096
BATCHES = 4
Array = NDArray[Any]


def write_table(folder: str, vectors: Array) -> str:
    """Publish an embedding table whose ids are row numbers."""
    parts = []
    for number, start in enumerate(range(0, len(vectors), PART_ROWS)):
        rows = vectors[start : start + PART_ROWS]
        ids = pa.array(np.arange(start, start + len(rows)))
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        buffer = io.BytesIO()
        table = pa.table({"id": ids, "place_id": ids, "embedding": column})
        pq.write_table(table, buffer, compression="none", use_dictionary=False)
        name = f"references/part-{number:05d}.parquet"
        parts.append(write_part(folder, name, buffer.getvalue(), len(rows)))
    publish(folder, "embeddings", parts)
    return folder


def measure_seconds(work: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(
    service: IndexService, version: int, index: VectorIndex, queries: Array, repeats: int
) -> list[list[float]]:
    """Measure the seconds of a batch in each repeat: in process, one caller, two callers."""
    batches = [queries] * BATCHES
    with ThreadPoolExecutor(2) as callers:

        def ask(batch: Array) -> None:
            service.search(version, batch, K)

        ways: list[Callable[[], object]] = [
            lambda: [index.search(batch, K) for batch in batches],
            lambda: [ask(batch) for batch in batches],  # type: ignore[func-returns-value]
            lambda: list(callers.map(ask, batches)),
        ]
        for way in ways:
            way()
        return [[measure_seconds(way) / BATCHES for way in ways] for _ in range(repeats)]


def measure_row(
    service: IndexService, version: int, vectors: Array, queries: Array, repeats: int
) -> list[Cell]:
    """Measure a built version against the same index in process."""
    engine: Any = service.engine
    ids = np.arange(len(vectors))
    index = VectorIndex.build(vectors, ids, kind="flat", engine=engine, num_threads=2)
    served, _ = service.search(version, queries, K)
    own, _ = index.search(queries, K)
    found = compare(service, version, index, queries, repeats)
    alone, one, two = (statistics.median(times) for times in zip(*found, strict=True))
    share_one = statistics.median(times[0] / times[1] for times in found)
    share_two = statistics.median(times[0] / times[2] for times in found)
    return [
        engine,
        len(vectors),
        round(BATCH / alone),
        round(BATCH / one),
        round(BATCH / two),
        f"{share_one:.0%}",
        f"{share_two:.0%}",
        round(1e3 * (one - alone), 1),
        f"{(served == own).mean():.3%}",
    ]


def measure(options: argparse.Namespace) -> list[list[Cell]]:
    """Measure all rows: each engine, with collections of each size."""
    rng = np.random.default_rng(0)
    rows = []
    queries = unit_rows(rng.standard_normal((BATCH, options.dim), dtype=np.float32))
    for engine in options.engines:
        cfg = MiningConfig(num_shards=2, index_threads=1, index_kind="flat", exact_engine=engine)
        with (
            tempfile.TemporaryDirectory() as folder,
            IndexService(cfg, f"{folder}/index") as service,
        ):
            for version, count in enumerate([2 * K, *options.counts]):
                vectors = unit_rows(rng.standard_normal((count, options.dim), dtype=np.float32))
                service.build(version, write_table(f"{folder}/{version}", vectors), k=K)
                files.remove(f"{folder}/{version}")
                rows.append(measure_row(service, version, vectors, queries, options.repeats))
    return rows


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 35_532, 100_000])
    parser.add_argument("--engines", nargs="+", default=["faiss", "torch"])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    rows = measure(options)
    ray.shutdown()
    record(
        "service",
        title="Index service: two shards against the same index in process",
        text=(
            "queries/s of batches of 1,000, top-128; the shares are medians over the repeats of a"
            " run in which both alternate. The smallest collection shows what the calls, the"
            " copies and the merging cost."
        ),
        command="python -m benchmarks.service",
        columns=[
            "engine",
            "vectors",
            "in process, 2 threads",
            "service, 2 x 1 thread, one caller",
            "two callers",
            "share, one caller",
            "share, two callers",
            "more for a batch, one caller, ms",
            "same ids",
        ],
        rows=rows,
        config={
            "D": options.dim,
            "k": K,
            "batch": BATCH,
            "repeats": options.repeats,
            "shards": 2,
            "kind": "flat",
        },
        order=50,
    )


if __name__ == "__main__":
    main()
