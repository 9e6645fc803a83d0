"""Measure exact evaluation against its published forms and the bare product: time and memory.

    python -m benchmarks.evaluation [--count 35532] [--large 92802] [--dim 1024]

Embeddings are random, each query near its own reference. The second table has the shape of
University-1652, satellite to drone: few queries with many own references each.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.published import evaluation as published_evaluation
from benchmarks.support.record import Cell, Meter, apart, record
from s4g_ray.evaluation.gallery_search import BLOCK_SCORES
from s4g_ray.evaluation.metrics import retrieve

Embeddings = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]


def draw_embeddings(
    num_queries: int, per_place: int, num_references: int, dim: int, noise: float
) -> Embeddings:
    """Draw queries, references and their places; both are equally far from their place."""
    rng = np.random.default_rng(0)
    places = np.arange(num_references) // per_place
    references = rng.standard_normal((num_references, dim), dtype=np.float32)
    queries = rng.standard_normal((num_queries, dim), dtype=np.float32)
    queries *= noise
    if per_place == 1:
        queries += references[:num_queries]
    else:
        centres = rng.standard_normal((places[-1] + 1, dim), dtype=np.float32)
        references *= noise
        references += centres[places]
        queries += centres[:num_queries]
    return queries, references, np.arange(num_queries), places


def multiply(queries: NDArray[np.float32], references: NDArray[np.float32]) -> None:
    """Compute the matrix product alone, in the blocks of the evaluation."""
    size = max(1, BLOCK_SCORES // len(references))
    q = torch.from_numpy(queries)
    r = torch.from_numpy(references)
    out = torch.empty(size, len(r))
    for start in range(0, len(q), size):
        rows = q[start : start + size]
        torch.mm(rows, r.T, out=out[: len(rows)])


def measure_here(*shape: Any) -> dict[str, Any]:
    """Measure the evaluation here and the product alone, after compiling."""
    data = draw_embeddings(*shape)
    retrieve(*draw_embeddings(100, shape[1], 100 * shape[1], *shape[3:]))
    found = Meter()(retrieve, *data)
    bare = Meter()(multiply, *data[:2])
    metrics = found.value.metrics("paper")
    return {
        "seconds": found.seconds,
        "extra_gb": found.extra_gb,
        "product_s": bare.seconds,
        **metrics,
    }


def measure_published(function: str, *shape: Any) -> dict[str, Any]:
    """Measure one of the published forms."""
    data = draw_embeddings(*shape)
    done = Meter()(getattr(published_evaluation, function), *data)
    return {"seconds": done.seconds, "extra_gb": done.extra_gb, "value": done.value}


def measure_recall_row(count: int, dim: int, with_published: bool) -> tuple[list[Cell], float]:
    """Measure a row of the first table; return it with the product's GFLOP/s."""
    shape = count, 1, count, dim, 4.0
    here = apart(measure_here, *shape)
    gflops = 2 * count**2 * dim / here["product_s"] / 1e9
    row: list[Cell] = [
        count,
        f"{here['product_s']:.1f} s ({gflops:.0f} GFLOP/s)",
        f"{here['seconds']:.1f} s",
        f"{here['seconds'] / here['product_s']:.2f}",
        f"{here['extra_gb']:.2f} GB",
    ]
    if not with_published:
        return [*row, "-", "-", "-", "-"], gflops
    there = apart(measure_published, "recalls", *shape)
    if any(abs(value - here[key]) > 2 / count for key, value in there["value"].items()):
        raise SystemExit(f"{count}: the forms disagree: {there['value']}, {here}")
    return [
        *row,
        f"{there['seconds']:.1f} s",
        f"{there['extra_gb']:.1f} GB",
        f"{there['seconds'] / here['seconds']:.1f}x",
        f"1/{there['extra_gb'] / here['extra_gb']:.0f}",
    ], gflops


def measure_ap_row(num_queries: int, num_references: int, dim: int, noise: float) -> list[Cell]:
    """Measure a row of the second table."""
    shape = num_queries, 54, num_references, dim, noise
    here = apart(measure_here, *shape)
    sorting = apart(measure_published, "average_precision", *shape)
    at_once = apart(measure_published, "average_precision_of_matrix", *shape)
    for there in (sorting, at_once):
        if abs(there["value"] - here["ap"]) > 1e-4:
            raise SystemExit(f"the forms disagree: {there['value']}, {here}")
    return [
        num_queries,
        num_references,
        f"{here['ap']:.3f}",
        f"{here['product_s']:.2f} s",
        f"{here['seconds']:.2f} s",
        f"{sorting['seconds']:.1f} s",
        f"{sorting['seconds'] / here['seconds']:.1f}x",
        f"{at_once['seconds']:.1f} s",
        f"{at_once['seconds'] / here['seconds']:.1f}x",
    ]


def main() -> None:
    """Measure and record both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=35_532)
    parser.add_argument(
        "--large", type=int, default=92_802, help="size without the published form; 0: none"
    )
    parser.add_argument(
        "--ap", type=int, nargs=2, default=[701, 51_355], help="queries and references; 0 0: none"
    )
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--name", default="evaluation")
    options = parser.parse_args()
    record_recall(options)
    if options.ap[0]:
        record_average_precision(options)


def record_recall(options: argparse.Namespace) -> None:
    """Record the first table: as many references as queries."""
    rows = [
        measure_recall_row(count, options.dim, count == options.count)
        for count in (options.count, options.large)
        if count
    ]
    record(
        options.name,
        title="Exact evaluation",
        text=(
            "every query against as many references, in float32 with float64 where two scores are"
            " too close to call, with ranks and average precision of both protocols, against the"
            " bare matrix product, which is the limit, and against the published form (all scores"
            " in memory, then for each query a count of those above its own; recall only). Both"
            " give the same recall. 92,802 is the size of CVACT's test set."
        ),
        command="python -m benchmarks.evaluation",
        columns=[
            "queries = references",
            "product",
            "here",
            "here / product",
            "memory",
            "published",
            "its memory",
            "faster",
            "share",
        ],
        rows=[row for row, _ in rows],
        config={"D": options.dim, "threads": torch.get_num_threads()},
        rates={"product_gflops": rows[0][1]},
        order=40,
    )


def record_average_precision(options: argparse.Namespace) -> None:
    """Record the second table: many own references for each query."""
    record(
        f"{options.name}_ap",
        title="Average precision",
        text=(
            "University-1652's shape, satellite to drone, 54 own references a query, with"
            " embeddings that retrieve well, badly and hardly at all: one matrix product and"
            " counting above each own reference, against one query after the other (its"
            " scores, all of them sorted, the positions of its own), and against sorting each"
            " row of one product."
        ),
        command="python -m benchmarks.evaluation",
        columns=[
            "queries",
            "references",
            "AP",
            "product",
            "here",
            "each query sorted",
            "faster",
            "product, then sorted",
            "faster",
        ],
        rows=[
            measure_ap_row(options.ap[0], options.ap[1], options.dim, noise)
            for noise in (1.5, 4.0, 100.0)
        ],
        config={"D": options.dim, "threads": torch.get_num_threads()},
        order=41,
    )


if __name__ == "__main__":
    main()
