"""Measure exact mining against its published form: time and memory, each in its own process.

    python -m benchmarks.mining [--counts 10000 35532 100000] [--large 300000 --sample 30000]

Published: the full similarity matrix and its top-k; then, for the train recall, the matrix again.
Here: the engine that is fastest on this machine; its candidates are filtered and merged into the
graph block by block, which also gives the train recall. The published form is run where it fits
--memory-gb. With --large references only --sample queries are searched; the table shows both.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.published.mining import nearest_places, train_recall
from benchmarks.support.record import Cell, Meter, apart, record
from s4g_ray.index import exact_search
from s4g_ray.mining.candidates import Filters, References, Widths, find_neighbors, merge_neighbors
from s4g_ray.mining.report import Counts, MiningReport

Vectors = NDArray[np.float32]
BLOCK = 8192  # queries in one search
CHECKED = 200  # queries whose neighbors are compared between the two
SIMILARITY = 0.15  # about that of a query with its own reference; others reach 0.13 at D = 1024


def draw_embeddings(num_queries: int, num_references: int, dim: int) -> tuple[Vectors, Vectors]:
    """Draw unit vectors queries[Q, D], references[R, D]; query i resembles reference i."""
    rng = np.random.default_rng(0)
    references = rng.standard_normal((num_references, dim), dtype=np.float32)
    references /= np.linalg.norm(references, axis=1, keepdims=True)
    queries = rng.standard_normal((num_queries, dim), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for start in range(0, num_queries, BLOCK):
        rows = slice(start, min(start + BLOCK, num_queries))
        queries[rows] += SIMILARITY * references[rows]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return queries, references


def measure_published(count: int, dim: int, k: int, num_threads: int) -> dict[str, Any]:
    """Measure the published round: seconds of its two steps, extra memory, neighbors, recall."""
    torch.set_num_threads(num_threads)
    queries, references = (
        torch.from_numpy(vectors) for vectors in draw_embeddings(count, count, dim)
    )
    nearest_places(queries[:500], references[:500], k)  # starts the threads
    meter = Meter()
    mined = meter(nearest_places, queries, references, k)
    recalled = meter(train_recall, queries, references)
    return {
        "top_k_s": mined.seconds,
        "round_s": mined.seconds + recalled.seconds,
        "recall": recalled.value,
        "extra_gb": max(mined.extra_gb, recalled.extra_gb),
        "sample": [mined.value[i] for i in range(CHECKED)],
    }


def mine_exactly(
    queries: Vectors, references: Vectors, k: int, engine: Any, num_threads: int
) -> Any:
    """Mine the graph and the train recall of queries and references of equal row, in one pass."""
    places = np.arange(len(references))
    known = References(places, places)
    filters = Filters(k)
    widths = Widths.from_references(known, filters, 1024)

    def search(block: Vectors, width: int) -> Any:
        return exact_search.search(
            block, references, places, width, engine=engine, num_threads=num_threads
        )

    kept = find_neighbors(
        search,
        queries,
        places[: len(queries)],
        known,
        filters,
        widths,
        block=BLOCK,
    )
    graph = merge_neighbors(places[: len(queries)], kept.neighbors, kept.scores, k)
    counts = Counts.from_queries(kept) + Counts.from_graph(graph, 0)
    report = MiningReport.from_counts(
        counts, k, has_previous=False, without_embedding=0, seconds=0, reused_parts=0
    )
    return graph, report


def measure_here(
    num_queries: int, num_references: int, dim: int, k: int, num_threads: int
) -> dict[str, Any]:
    """Measure the round here, after choosing and compiling the engine."""
    queries, references = draw_embeddings(num_queries, num_references, dim)
    engine = exact_search.choose_engine(dim, num_threads)
    mine_exactly(queries[:500], references[:1000], k, engine, num_threads)  # compiles
    mined = Meter()(mine_exactly, queries, references, k, engine, num_threads)
    graph, report = mined.value
    return {
        "round_s": mined.seconds,
        "extra_gb": mined.extra_gb,
        "recall": report.train_recall,
        "engine": engine,
        "sample": graph.neighbors[:CHECKED].tolist(),
    }


def measure_agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Return the share of neighbors that two graphs have in common."""
    shared = sum(len(set(x) & set(y)) for x, y in zip(a, b, strict=True))
    return shared / sum(len(x) for x in a)


def measure_row(num_queries: int, num_references: int, options: argparse.Namespace) -> list[Cell]:
    """Measure a row of the table."""
    dim = options.dim
    k = options.k
    threads = options.threads
    here = apart(measure_here, num_queries, num_references, dim, k, threads)
    row: list[Cell] = [
        num_queries,
        num_references,
        f"{here['round_s']:.1f} s",
        f"{1000 * here['extra_gb']:.0f} MB",
        here["engine"],
        f"{here['recall'][1]:.1%}",
    ]
    if num_queries < num_references:
        return [*row, *["-"] * 6]
    # blocks and the matrix that joins them, and the vectors
    need_gb = (8 * num_references + 8 * dim) * num_queries / 1e9
    if need_gb > options.memory_gb:
        return [*row, "-", "-", f"{need_gb:.0f} GB wanted", "-", "-", "-"]
    there = apart(measure_published, num_references, dim, k, threads)
    same = measure_agreement(there["sample"], here["sample"])
    if same < 0.999 or abs(there["recall"][1] - here["recall"][1]) > 1e-3:
        raise SystemExit(
            f"{num_references}: graphs agree in {same:.2%}; {there['recall']}, {here['recall']}"
        )
    return [
        *row,
        f"{there['top_k_s']:.1f} s",
        f"{there['round_s']:.1f} s",
        f"{there['extra_gb']:.1f} GB",
        f"{there['top_k_s'] / here['round_s']:.1f}x",
        f"{there['round_s'] / here['round_s']:.1f}x",
        f"{there['extra_gb'] / here['extra_gb']:.0f}x",
    ]


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="*", default=[10_000, 35_532, 100_000])
    parser.add_argument("--large", type=int, default=300_000)
    parser.add_argument("--sample", type=int, default=30_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-gb", type=float, default=14.0)
    parser.add_argument("--name", default="mining")
    options = parser.parse_args()
    sizes = [(count, count) for count in options.counts]
    if options.large:
        sizes.append((options.sample, options.large))
    record(
        options.name,
        title="Exact mining",
        text=(
            "one mining round, top-k and train recall, against the published form (full similarity"
            " matrix and top-k; then the matrix again for the train recall). Both give the same"
            " neighbors and recall. Memory is beyond the embeddings. Times grow with queries x"
            " references: the last row searches a sample of its queries."
        ),
        command="python -m benchmarks.mining",
        columns=[
            "queries",
            "references",
            "here",
            "memory",
            "engine",
            "train R@1",
            "published top-k",
            "published round",
            "its memory",
            "top-k / here",
            "round / here",
            "memory ratio",
        ],
        rows=[
            measure_row(num_queries, num_references, options)
            for num_queries, num_references in sizes
        ],
        config={"D": options.dim, "k": options.k, "threads": options.threads, "block": BLOCK},
        order=20,
    )


if __name__ == "__main__":
    main()
