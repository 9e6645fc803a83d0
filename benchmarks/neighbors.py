"""Measure geographic neighbors against the published N x N form: time, memory and their growth.

    python -m benchmarks.neighbors [--counts 10000 35532] [--large 100000 1000000 10000000]

Places lie at random in a square, one in 30 x 30 m on average. The form here runs as for a published
graph: block by block, each written as Parquet (and removed again).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.published.geography import nearest
from benchmarks.support.record import Cell, Meter, apart, record
from s4g_ray.data.places import Places
from s4g_ray.data.tables.neighbor_graph import write_graph_part
from s4g_ray.sampling.geographic_neighbors import (
    geographic_blocks,
    geographic_graph,
    geographic_neighbors,
)

SPACING_DEG = 30 / 111_195
REPEATS = 5  # runs whose median counts, up to REPEATED_PLACES
REPEATED_PLACES = 100_000  # which take a second
CHECKED = 500  # places whose neighbors both forms must agree on


def draw_city(count: int) -> Places:
    """Draw places in a square."""
    rng = np.random.default_rng(0)
    side = SPACING_DEG * count**0.5
    lat, lon = rng.uniform(0, side, count), rng.uniform(0, side, count)
    return Places(np.arange(count), lat, lon)


def write_blocks(places: Places, k: int, folder: str) -> dict[str, float]:
    """Compute and write a graph block by block; return seconds of both and the bytes written."""
    blocks = geographic_blocks(places, k)
    number = 0
    found = {"compute_s": 0.0, "write_s": 0.0, "bytes": 0.0}
    while True:
        started = time.perf_counter()
        block = next(blocks, None)
        computed = time.perf_counter()
        found["compute_s"] += computed - started
        if block is None:
            return found
        part = write_graph_part(folder, number, block)
        found["write_s"] += time.perf_counter() - computed
        found["bytes"] += part.num_bytes
        Path(folder, part.name).unlink()
        number += 1


def measure_here(count: int, k: int) -> dict[str, Any]:
    """Measure the form here, after compiling and importing."""
    geographic_graph(draw_city(1000), k)
    with tempfile.TemporaryDirectory() as folder:
        write_blocks(draw_city(1000), k, folder)
        places = draw_city(count)
        num_runs = REPEATS if count <= REPEATED_PLACES else 1
        runs = [Meter()(write_blocks, places, k, folder) for _ in range(num_runs)]
        streamed = sorted(runs, key=lambda run: run.value["compute_s"])[len(runs) // 2]
    sample = None
    if count <= REPEATED_PLACES:
        sample = geographic_neighbors(places.lat, places.lon, k)[0][:CHECKED]
    return {**streamed.value, "extra_gb": max(run.extra_gb for run in runs), "sample": sample}


def measure_published(count: int, k: int) -> dict[str, Any]:
    """Measure the N x N form."""
    places = draw_city(count)
    nearest(places.lat[:500], places.lon[:500], k)
    done = Meter()(nearest, places.lat, places.lon, k)
    return {"seconds": done.seconds, "extra_gb": done.extra_gb, "sample": done.value[:CHECKED]}


def measure_agreement(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Return the share of neighbors that two forms have in common."""
    num_shared = sum(len(np.intersect1d(x, y)) for x, y in zip(a, b, strict=True))
    return num_shared / a.size


def measure_row(count: int, k: int, with_published: bool) -> tuple[list[Cell], dict[str, float]]:
    """Measure a row of the table; return it with the rates."""
    here = apart(measure_here, count, k)
    rates = {
        "neighbors_per_s_per_core": count * k / here["compute_s"] / (os.cpu_count() or 1),
        "bytes_per_place": here["extra_gb"] * 1e9 / count,
        "disk_bytes_per_pair": here["bytes"] / count / k,
    }
    row: list[Cell] = [
        count,
        f"{here['compute_s']:.2f} s",
        f"{here['extra_gb']:.2f} GB",
        f"{here['write_s']:.2f} s",
        f"{here['bytes'] / 1e9:.2f} GB",
    ]
    if not with_published:
        return [*row, "-", "-", "-", "-"], rates
    there = apart(measure_published, count, k)
    same = measure_agreement(here["sample"], there["sample"])
    if same < 0.9999:
        raise SystemExit(f"{count}: the forms agree on {same:.2%} of the neighbors only")
    return [
        *row,
        f"{there['seconds']:.1f} s",
        f"{there['extra_gb']:.2f} GB",
        f"{there['seconds'] / here['compute_s']:.0f}x",
        f"1/{there['extra_gb'] / here['extra_gb']:.0f}",
    ], rates


def main() -> None:
    """Measure and record the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--counts", type=int, nargs="*", default=[10_000, 35_532], help="compared with N x N"
    )
    parser.add_argument("--large", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--name", default="neighbors")
    options = parser.parse_args()
    found = [
        measure_row(count, options.k, count in options.counts)
        for count in [*options.counts, *options.large]
    ]
    record(
        options.name,
        title="Geographic neighbors",
        text=(
            "the nearest places of each place, computed block by block along a space-filling"
            " curve, against the published form (a matrix of all distances by haversine, in"
            " radians, and its top-k). Both give the same neighbors. Up to 100,000 places the"
            " median of five runs. Memory is beyond the places' coordinates and holds a block as"
            " it is written; the share is of the published form's."
        ),
        command="python -m benchmarks.neighbors",
        columns=[
            "places",
            "here",
            "memory",
            "writing Parquet",
            "on disk",
            "N x N",
            "its memory",
            "faster",
            "share",
        ],
        rows=[row for row, _ in found],
        config={"k": options.k},
        rates=found[-1][1],
        order=10,
    )


if __name__ == "__main__":
    main()
