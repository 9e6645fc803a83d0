"""Measure batch plans against the published form on lists, and at sizes that lists cannot reach.

    python -m benchmarks.planning [--compare 10000 100000 300000] [--scale 1000000 10000000]
                                  [--cells 1000000]

Each row is measured in processes of its own.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.published.planning import plan_with_lists
from benchmarks.support.record import Cell, Meter, apart, record
from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.places import Places
from s4g_ray.data.tables.batch_plan import BatchPlan
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.sampling.cells import plan_cells
from s4g_ray.sampling.compact_graph import CompactGraph
from s4g_ray.sampling.geographic_neighbors import geographic_graph
from s4g_ray.sampling.sampler import plan_batches

SIZES: dict[str, Any] = {"batch_size": 128, "num_hard_negatives": 64, "neighbor_pool_size": 128}
SPACING_M = 30.0  # of the lattice
RADIUS_M = 50.0  # exclude_radius_m of the rows that have one
TILE = 32  # side of a tile of the lattice; places of a tile have consecutive ids
METRES_PER_DEGREE = 111_195.0
REPEATS = 5


def draw_city(count: int) -> tuple[Places, NeighborGraph]:
    """Draw places in a square, 100 in a square kilometre, and find their 128 nearest neighbors."""
    rng = np.random.default_rng(0)
    side = 0.1 * count**0.5 * 1000 / METRES_PER_DEGREE
    places = Places(np.arange(count), rng.uniform(0, side, count), rng.uniform(0, side, count))
    return places, geographic_graph(places, 128)


def measure_lists(count: int) -> dict[str, float]:
    """Measure the published form at `count` pairs."""
    places, graph = draw_city(count)
    neighbors = dict(zip(places.ids.tolist(), graph.neighbors.tolist(), strict=True))
    pairs = [(place, number) for number, place in enumerate(places.ids.tolist())]
    done = Meter()(
        plan_with_lists, pairs, neighbors, batch_size=128, num_hard=64, pool_size=128, seed=0
    )
    batches = np.array([[place for place, _ in batch] for batch in done.value])
    hard = sum(int(np.isin(graph.neighbors[batch, :64], batch).sum()) for batch in batches)
    return {
        "seconds": done.seconds,
        "gb": done.extra_gb,
        "hardness": hard / batches.size,
        "left_out": count - batches.size,
    }


def measure_here(count: int) -> dict[str, float]:
    """Measure plan_batches at `count` pairs, on rows of the graph: the median of REPEATS calls."""
    places, graph = draw_city(count)
    pairs = PairTable(places.ids, places.ids, places.ids)
    CompactGraph.from_graph(graph, places.ids, 128)  # compiles
    started = time.perf_counter()
    rows = CompactGraph.from_graph(graph, places.ids, 128)
    converted = time.perf_counter() - started
    plan_batches(pairs, rows, **SIZES, seed=0, epoch=0)  # compiles
    runs = [
        Meter()(plan_batches, pairs, rows, **SIZES, seed=0, epoch=epoch)
        for epoch in range(1, 1 + REPEATS)
    ]
    stats = runs[0].value.stats
    return {
        "seconds": float(np.median([run.seconds for run in runs])),
        "gb": max(run.extra_gb for run in runs),
        "hardness": stats.hardness,
        "left_out": stats.num_left_out,
        "converted": converted,
    }


def make_lattice(count: int) -> tuple[Places, CompactGraph]:
    """Make a city of at least `count` places: a lattice on a torus, numbered tile by tile.

    Neighbors are found by constant offsets in the lattice.
    """
    side = TILE * math.ceil(math.ceil(count**0.5) / TILE)
    tiles = np.arange(side * side, dtype=np.int32).reshape(side // TILE, side // TILE, TILE, TILE)
    number = tiles.transpose(0, 2, 1, 3).reshape(side, side)  # [y, x] -> number of the place there
    y, x = np.empty(side * side, dtype=np.int32), np.empty(side * side, dtype=np.int32)
    y[number], x[number] = np.indices((side, side), dtype=np.int32)
    dy, dx = np.indices((15, 15)).reshape(2, -1) - 7
    nearest = np.argsort(dy**2 + dx**2, kind="stable")[1:129]
    rows = np.empty((side * side, 128), dtype=np.int32)
    for start in range(0, side * side, 50_000):
        block = slice(start, start + 50_000)
        rows[block] = number[
            (y[block, None] + dy[nearest]) % side, (x[block, None] + dx[nearest]) % side
        ]
    degrees = SPACING_M / METRES_PER_DEGREE
    lat, lon = ((axis.astype(np.float64) - side / 2) * degrees for axis in (y, x))
    places = Places(np.arange(side * side), lat, lon)
    return places, CompactGraph(places.ids, rows)


def measure_scale(count: int, radius_m: float) -> dict[str, float]:
    """Measure plan_batches on the lattice; memory is beyond the graph and the pairs."""
    plan_small(radius_m)
    places, graph = make_lattice(count)
    ids: NDArray[np.int64] = places.ids[:count]
    pairs = PairTable(ids, ids, ids)
    exclusions = exclude(places, radius_m)
    done = Meter()(plan_batches, pairs, graph, **SIZES, seed=0, epoch=1, exclusions=exclusions)
    with tempfile.TemporaryDirectory() as folder:
        saved = Meter()(done.value.save, f"{folder}/plan.parquet", pairs)
    stats = done.value.stats
    return {
        "seconds": done.seconds,
        "gb": done.extra_gb,
        "hardness": stats.hardness,
        "left_out": stats.num_left_out,
        "save_seconds": saved.seconds,
        "save_gb": saved.extra_gb,
        "graph_gb": graph.rows.nbytes / 1e9,
    }


def measure_cells(count: int, max_pairs: int) -> BatchPlan:
    """Plan the lattice in cells of at most max_pairs, with RADIUS_M excluded."""
    places, graph = make_lattice(count)
    ids: NDArray[np.int64] = places.ids[:count]
    return plan_cells(
        PairTable(ids, ids, ids),
        graph,
        places,
        **SIZES,
        seed=0,
        epoch=1,
        exclusions=exclude(places, RADIUS_M),
        max_pairs_per_cell=max_pairs,
    )


def plan_small(radius_m: float) -> None:
    """Compile the code that measure_scale measures."""
    places, graph = make_lattice(1024)
    pairs = PairTable(places.ids, places.ids, places.ids)
    exclusions = exclude(places, radius_m)
    plan_batches(pairs, graph, **SIZES, seed=0, epoch=0, exclusions=exclusions)


def exclude(places: Places, radius_m: float) -> Exclusions | None:
    """Exclude all places within a radius; return None for radius 0."""
    if not radius_m:
        return None
    no_pairs = PlacePairs.from_arrays(*np.zeros((2, 0), dtype=np.int64))
    return Exclusions(places, no_pairs, radius_m)


def record_comparison(counts: list[int]) -> None:
    """Record the table against the published form."""
    rows: list[list[Cell]] = []
    for count in counts:
        theirs = apart(measure_lists, count)
        own = apart(measure_here, count)
        rows.append(
            [
                count,
                f"{theirs['seconds']:.2f}",
                f"{own['seconds'] * 1000:.1f}",
                f"{theirs['seconds'] / own['seconds']:.0f}",
                f"{own['converted'] * 1000:.0f}",
                f"{theirs['hardness']:.2f}",
                f"{own['hardness']:.2f}",
                f"{theirs['left_out'] / count:.3%}",
                f"{own['left_out'] / count:.3%}",
                f"{theirs['gb']:.2f}",
                f"{own['gb']:.3f}",
            ]
        )
    record(
        "planning",
        title="Batch plans against the published form",
        order=30,
        text=(
            "one pair a place, a uniform city, the same geographic graph. Lists: a shuffled Python"
            " list read with pop(0), deep-copied neighbor lists. Ours: `plan_batches` on int32"
            " rows, hardness counted too; making the rows from a graph in memory stands beside it."
            " Hardness: how many of a place's 64 nearest share its batch. Memory is beyond the"
            " graph and the pairs."
        ),
        command="python -m benchmarks.planning",
        config={**SIZES, "neighbors": 128, "repeats": REPEATS},
        columns=[
            "pairs",
            "lists, s",
            "ours, ms",
            "ratio",
            "rows, ms",
            "hardness, lists",
            "ours",
            "left out, lists",
            "ours",
            "GB, lists",
            "ours",
        ],
        rows=rows,
    )


def record_scale(counts: list[int]) -> None:
    """Record the table of large plans."""
    rows: list[list[Cell]] = []
    rates: dict[str, float] = {}
    for count in counts:
        for radius_m in (0.0, RADIUS_M):
            own: dict[str, Any] = apart(measure_scale, count, radius_m)
            rows.append(
                [
                    count,
                    f"{radius_m:.0f}",
                    f"{own['seconds']:.2f}",
                    f"{own['gb']:.2f}",
                    f"{own['graph_gb']:.2f}",
                    f"{own['hardness']:.2f}",
                    f"{own['left_out'] / count:.4%}",
                    f"{own['save_seconds']:.2f}",
                    f"{own['save_gb']:.2f}",
                ]
            )
            if not radius_m:  # the rates of the largest count stay
                rates = {
                    "pairs_per_s": count / own["seconds"],
                    "bytes_per_pair": own["gb"] * 1e9 / count,
                }
    record(
        "planning_scale",
        title="Batch plans at scale",
        order=31,
        text=(
            "one pair a place in one pass. The graph is made up, not searched: a lattice of"
            f" {SPACING_M:.0f} m on a torus in tiles of 32 x 32, each place with its 128 nearest"
            " lattice points, int32. What binds is random reads: a graph row of 512 bytes an"
            " anchor and 16 bytes of state a candidate. Memory is beyond the graph and the pairs."
        ),
        command="python -m benchmarks.planning",
        config={**SIZES, "neighbors": 128},
        columns=[
            "pairs",
            "exclude_radius_m",
            "plan, s",
            "GB",
            "graph, GB",
            "hardness",
            "left out",
            "save, s",
            "save, GB",
        ],
        rows=rows,
        rates=rates,
    )


def record_cells(count: int) -> None:
    """Record what division into cells costs in hardness: the same pairs in ever smaller cells."""
    rows: list[list[Cell]] = []
    whole = 0.0
    for divisor in (1, 4, 16, 64):
        stats = apart(measure_cells, count, count // divisor).stats
        whole = whole or stats.hardness
        rows.append(
            [
                count // divisor,
                stats.num_cells,
                f"{stats.hardness:.3f}",
                f"{stats.hardness / whole:.2%}",
                f"{stats.num_left_out / count:.4%}",
            ]
        )
    record(
        "planning_cells",
        title="Batch plans in cells",
        order=32,
        text=(
            f"{count:,} pairs of the lattice of the table above, each epoch in cells of at most so"
            f" many pairs, exclude_radius_m={RADIUS_M:.0f}. Neighbors on the other side of a cut"
            " never meet: what a plan loses follows the length of the cuts."
        ),
        command="python -m benchmarks.planning",
        config={**SIZES, "neighbors": 128},
        columns=["max_pairs_per_cell", "cells", "hardness", "of one pass", "left out"],
        rows=rows,
    )


def main() -> None:
    """Measure and record the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--compare", type=int, nargs="*", default=[10_000, 100_000, 300_000])
    parser.add_argument("--scale", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--cells", type=int, default=1_000_000)
    options = parser.parse_args()
    if options.compare:
        record_comparison(options.compare)
    if options.scale:
        record_scale(options.scale)
    if options.cells:
        record_cells(options.cells)


if __name__ == "__main__":
    main()
