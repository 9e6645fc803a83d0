"""Replay the metadata of 10^7 and 10^8 places through what the driver does, without images.

    python -m benchmarks.replay [--places 10000000]

Each row is a process of its own, with synthetic ids and positions; memory is what the function
takes beyond its inputs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.support.record import Cell, Meter, apart, record
from s4g_ray.arrays import Ints
from s4g_ray.config.schema import MiningConfig, SamplingConfig
from s4g_ray.data.pairs import join_pairs
from s4g_ray.data.places import Places
from s4g_ray.data.tables.embedding_table import ROWS_PER_GROUP
from s4g_ray.encoder.embedding.block_queue import BlockQueue
from s4g_ray.encoder.embedding.outcomes import BlockResult, Written
from s4g_ray.encoder.embedding.part_plan import Block, plan_parts, rows_of_part
from s4g_ray.index.sharded.sharding import TablePart, deal_rows
from s4g_ray.mining.candidates import Filters, References, Widths
from s4g_ray.mining.cells.cell_plan import CellPlan
from s4g_ray.mining.groups import compute_job_key, places_per_part, plan_groups
from s4g_ray.mining.job_plan import describe_group
from s4g_ray.pipeline.rounds.rotation import choose_places
from s4g_ray.sampling.cells import CellTree, PlanOptions
from s4g_ray.storage.manifest import Part, open_published, publish

DIM = 1024
K = 128
BATCH = 128
SHARDS = 64
LARGEST = {"mining: cells": 10_000_000, "mining: places of a rotating round": 10_000_000}
Work = Callable[[], object]


def make_ids(places: int) -> Ints:
    """Make ascending ids with gaps."""
    rng = np.random.default_rng(0)
    return np.cumsum(rng.integers(1, 9, places))


def make_places(places: int) -> Places:
    """Place them in cities."""
    rng = np.random.default_rng(1)
    city = np.arange(places) // 1000
    centres = rng.uniform((-60, -170), (60, 170), (int(city[-1]) + 1, 2))
    at = centres[city] + 0.05 * rng.standard_normal((places, 2))
    return Places(make_ids(places), at[:, 0], at[:, 1])


def list_table_parts(places: int) -> list[Part]:
    """List the parts of the references of an embedding table."""
    rows = rows_of_part(32, DIM, "float16")
    counts = [min(rows, places - start) for start in range(0, places, rows)]
    return [
        Part(f"references/part-{number:05d}.parquet", count, 33_000_000, "0" * 64)
        for number, count in enumerate(counts)
    ]


def plan_embedding(places: int) -> Work:
    """Plan the parts and blocks of one view, and go through the queue of its work."""
    ids = make_ids(places)
    rows = rows_of_part(32, DIM, "float16")

    def work() -> int:
        parts = plan_parts("references", ids, ids, part_rows=rows, batch_size=BATCH)
        queue = BlockQueue(parts)
        while not queue.is_done:
            taken = queue.take()
            if isinstance(taken, Block):
                size = len(taken.rows)
                part = Part(taken.name, size, 2 * DIM * size, "0" * 64)
                queue.finish_block(taken, BlockResult(Written(part), size, "host:1", 0.0, 1.0))
            elif taken is not None:
                part = Part(taken.name, 1, 1, "0" * 64)
                queue.finish_join(taken, Written(part))  # type: ignore[arg-type]
        return len(parts)

    return work


def write_manifest(places: int) -> Work:
    """Publish and read the manifest of a table of two views."""
    parts = list_table_parts(places) * 2

    def work() -> int:
        with tempfile.TemporaryDirectory() as folder:
            publish(folder, "embeddings", parts)
            return len(open_published(folder, "embeddings").parts)

    return work


def deal_references(places: int) -> Work:
    """Deal the row groups of a table to shards."""
    sources = [TablePart("table", part) for part in list_table_parts(places)]
    counts = [
        [
            min(ROWS_PER_GROUP, source.part.rows - row)
            for row in range(0, source.part.rows, ROWS_PER_GROUP)
        ]
        for source in sources
    ]
    return partial(deal_rows, sources, counts, SHARDS)


def plan_mining(places: int) -> Work:
    """Check the references, choose widths, group the parts and compute the job's key."""
    ids = make_ids(places)
    parts = list_table_parts(places)
    cfg = MiningConfig()

    def work() -> str:
        references = References(ids, ids)
        Widths.from_references(references, Filters.from_config(cfg, K, None), cfg.max_candidates)
        sizes = [part.rows for part in parts]
        for number, group in enumerate(plan_groups(sizes, places_per_part(cfg.part_mb, K))):
            json.dumps(describe_group(number, parts, group))
        return compute_job_key({}, ids, references, None)

    return work


def plan_cells(places: int) -> Work:
    """Plan the cells of mining.scope=cells."""
    located = make_places(places)
    references = References(located.ids, located.ids)
    cfg = MiningConfig(scope="cells")
    return partial(CellPlan.from_places, located, located.ids, references, cfg, K, (0, 1))


def join(places: int) -> Work:
    """Pair queries with references."""
    ids = make_ids(places)
    return partial(join_pairs, ids, ids, ids, ids)


def rotate(places: int) -> Work:
    """Choose the places of a round of mining.refresh=rotate."""
    cfg = MiningConfig(refresh="rotate")
    return partial(choose_places, make_places(places), cfg, 3, seed=0)


def divide(places: int) -> Work:
    """Divide the pairs of an epoch into the cells that are planned."""
    located = make_places(places)
    pair_rows = np.arange(places, dtype=np.int32)
    cfg = SamplingConfig()
    options = PlanOptions(BATCH, cfg.num_hard_negatives, cfg.neighbor_pool_size, seed=0, epoch=1)
    return partial(CellTree.divide, located, pair_rows, cfg.max_pairs_per_cell, options)


FUNCTIONS: dict[str, Callable[[int], Work]] = {
    "pairs of queries and references": join,
    "embedding: parts, blocks, queue": plan_embedding,
    "manifest of a table": write_manifest,
    "index: dealing to 64 shards": deal_references,
    "mining: widths, groups, key": plan_mining,
    "mining: cells": plan_cells,
    "mining: places of a rotating round": rotate,
    "plan: cells of pairs": divide,
}


def measure(name: str, places: int) -> list[Cell]:
    """Measure a function in this process: the row of the table."""
    FUNCTIONS[name](2000)()  # imports and compiles what is lazy
    work = FUNCTIONS[name](places)
    started = time.process_time()
    measured = Meter()(work)
    cpu_s = time.process_time() - started
    return [
        places,
        name,
        round(measured.seconds, 2),
        round(cpu_s, 2),
        round(1e6 * cpu_s / places, 3),
        round(1e9 * measured.extra_gb / places, 1),
    ]


def main() -> None:
    """Measure all functions and record them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, nargs="+", default=[10_000_000, 100_000_000])
    given = parser.parse_args()
    rows = []
    for places in given.places:
        for name in FUNCTIONS:
            if places > LARGEST.get(name, places):
                continue
            rows.append(apart(measure, name, places))
            print(rows[-1], flush=True)
    record(
        "replay",
        title="What the driver does, at 10^7 and 10^8 places",
        text=(
            "synthetic metadata through every function that the driver runs over all places,"
            f" without images; parts of 32 MB of float16 at D = {DIM}, k = {K}, {SHARDS} shards."
            " Bytes are what a function takes at its peak beyond its inputs."
        ),
        command="python -m benchmarks.replay",
        columns=["places", "function", "s", "CPU s", "us a place", "bytes a place"],
        rows=rows,
        config={"dim": DIM, "k": K, "shards": SHARDS},
        rates={f"{row[1]} us": float(row[4]) for row in rows if row[0] == max(given.places)},
        order=91,
    )


if __name__ == "__main__":
    main()
