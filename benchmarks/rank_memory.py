"""Measure what a training rank holds of a data set, and what its node shares.

    python -m benchmarks.rank_memory [--counts 1000000 10000000] [--lists 1000000]

Data sets of places (a query and a reference each, no images) as loose files and packed, with gaps
between their ids. Another process has the tables mapped meanwhile, as another rank of the node has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.support import rank_probe
from benchmarks.support.record import Cell, apart, record
from s4g_ray.data.tables.node_cache import open_image_tables

RANKS = 2
KINDS = ("loose", "packed")
BUDGET = 32  # private bytes a place


def probe(uri: str, plan: str, cache_dir: str, form: str) -> dict[str, float]:
    """Measure one form in a new process."""
    command = [sys.executable, "-m", "benchmarks.support.rank_probe", uri, plan, cache_dir, form]
    done = subprocess.run(
        [*command, "--ranks", str(RANKS)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)[form]
    return found


def measure_count(count: int, packed: bool, with_lists: bool) -> list[Cell]:
    """Measure all forms on one data set: a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        uri = apart(rank_probe.write_places, Path(folder), count, packed=packed)
        plan = apart(rank_probe.write_plan, Path(folder), count)
        lists: Cell = "not run"
        if with_lists:
            lists = round(probe(uri, plan, folder, "lists")["tables"] / count, 1)
        started = time.perf_counter()
        tables = open_image_tables(uri, rank_probe.SPLITS, folder)
        built_s = time.perf_counter() - started
        rank_probe.touch(tables)
        found = probe(uri, plan, folder, "mapped")
        cached = sum(file.stat().st_size for file in Path(folder).glob("s4g-ray-*/*/*"))
    private = (found["tables"] + found["plan"]) / count
    return [
        f"{count:,} {'packed' if packed else 'loose'}",
        lists,
        round(found["tables"] / count, 2),
        round(found["plan"] / count, 2),
        round(private, 2),
        "yes" if private <= BUDGET else "NO",
        round(found["shared"] / count, 1),
        round(cached / count, 1),
        f"{built_s:.1f} s",
        f"{1e3 * found['open_s']:.1f} ms",
        f"{1e3 * found['look_up_s']:.2f} ms",
    ]


def main() -> None:
    """Measure and record all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--lists", type=int, default=1_000_000, help="largest count for lists")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    given = parser.parse_args()
    other_load = round(os.getloadavg()[0], 1)
    rows = []
    for count in given.counts:
        for kind in given.kinds:
            rows.append(measure_count(count, kind == "packed", count <= given.lists))
            print(rows[-1], flush=True)
    record(
        "rank_memory",
        title="Memory of a training rank",
        text=(
            "private bytes a place (a query, a reference and their pair) of a rank, after all rows"
            " were read; lists: the columns as Python lists and arrays of each rank, as before,"
            " with what Arrow keeps after reading and validating the data set;"
            " tables: mapped from the node's cache; plan: the rank's share of an epoch's pairs, of"
            f" {RANKS} ranks. Shared: pages of the page cache that all ranks of a node map. Built:"
            " once a node, validation of the data set and the start of a process included. Batch:"
            f" finding the files of {rank_probe.BATCH} random ids of one view."
        ),
        command="python -m benchmarks.rank_memory",
        columns=[
            "places",
            "lists",
            "tables",
            "plan",
            "private",
            f"at most {BUDGET}",
            "shared",
            "on disk",
            "built",
            "opened",
            "batch",
        ],
        rows=rows,
        config={"ranks": RANKS, "batch": rank_probe.BATCH, "other load": other_load},
        order=35,
    )


if __name__ == "__main__":
    main()
