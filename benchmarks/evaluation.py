"""Exact evaluation at the size of CVACT's test set: time against the bare matrix product, and peak memory.

    python -m benchmarks.evaluation [--count 92802] [--dim 1024]

Embeddings are random, each query near its own reference; recall within three radii is counted too.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from benchmarks.machine import machine
from s4g_ray.evaluation import BLOCK_SCORES, retrieve


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=92_802)
    parser.add_argument("--dim", type=int, default=1024)
    options = parser.parse_args()
    count, rng = options.count, np.random.default_rng(0)
    references = rng.standard_normal((count, options.dim), dtype=np.float32)
    queries = rng.standard_normal((count, options.dim), dtype=np.float32)
    queries *= 4
    queries += references  # in place: temporaries would count as memory that was in use before
    latlon = np.stack([rng.uniform(-35.4, -35.2, count), rng.uniform(149.0, 149.2, count)], axis=1)
    places, small = np.arange(count), slice(0, 100)
    radii = (5.0, 25.0, 50.0)
    retrieve(queries[small], references[small], places[small], places[small])  # compiles
    block = max(1, BLOCK_SCORES // count)
    before, started = peak_gb(), time.perf_counter()
    for start in range(0, count, block):
        queries[start : start + block] @ references.T
    product_s = time.perf_counter() - started
    started = time.perf_counter()
    found = retrieve(
        queries, references, places, places, query_latlon=latlon, reference_latlon=latlon, radii_m=radii
    ).metrics()
    whole_s = time.perf_counter() - started
    flops = 2 * count**2 * options.dim
    print("| queries x references | D | matrix product | evaluation | ratio | memory beyond the embeddings |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {count:,} x {count:,} | {options.dim} | {product_s:.0f} s ({flops / product_s / 1e9:.0f} GFLOP/s) |"
        f" {whole_s:.0f} s | {whole_s / product_s:.2f} | {peak_gb() - before:.2f} GB |"
    )
    print(json.dumps({"recall@1": found["recall@1"], "recall@1_within_5m": found["recall@1_within_5m"], **machine()}))


if __name__ == "__main__":
    main()
