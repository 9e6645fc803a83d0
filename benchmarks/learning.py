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
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from benchmarks.support.learning_arms import ARMS, BATCH_SIZE, DATA, SHARED
from benchmarks.support.record import RESULTS, Cell, record
from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Floats64
from s4g_ray.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    from s4g_ray.config.schema import RunConfig

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = RESULTS / "learning"
LEFT_OUT = 0.03  # share of an epoch's pairs that a plan may leave out
NUM_POINTS = 6  # of a curve, beside the untrained encoder's
Key = tuple[str, int]  # the name of an arm, and a seed


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
        ProcessPoolExecutor(processes, get_context("spawn"), _prepare_process) as pool,
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


def _prepare_process() -> None:
    import torch

    keep_freed_memory()
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
    """Return the steps of an arm's runs: arms of equal `times` see as many pairs."""
    return ARMS[arm].times * DATA[name].num_steps * BATCH_SIZE // ARMS[arm].batch_size


@cache
def describe_run(name: str, arm: str) -> dict[str, Any]:
    """Return the settings of an arm's runs; a run with others is not taken for one of them."""
    from s4g_ray.config.loading import load_config

    config = load_config(CONFIGS / f"{name}.yaml", [*list_overrides(name, arm), "data.uri=none"])
    options: dict[str, Any] = json.loads(json.dumps(DATA[name].options))
    steps = count_steps(name, arm)
    return {"settings": _list_settings(config), "options": options, "num_steps": steps}


@cache
def list_defaults() -> dict[str, Any]:
    """Return the settings of a configuration that says nothing."""
    from s4g_ray.config.loading import parse_config

    return _list_settings(parse_config({"run_dir": "none", "data": {"uri": "none"}}))


def _list_settings(config: RunConfig) -> dict[str, Any]:
    """Return what may change what is learned, as JSON reads it."""
    from s4g_ray.config.loading import flatten_config

    settings = flatten_config(config, exclude={"ray", "storage", "run_dir", "seed", "evaluation"})
    found: dict[str, Any] = json.loads(json.dumps(settings))
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
    fewest = count_epochs(num_steps, num_pairs, config.train.batch_size)
    epochs = max(config.train.epochs, fewest)
    warmup = config.train.warmup_epochs * epochs / config.train.epochs
    overrides += [f"train.epochs={epochs}", f"train.warmup_epochs={warmup}"]
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    return LearningRun(config, num_steps, NUM_POINTS).run().record()


def count_epochs(num_steps: int, num_pairs: int, batch_size: int) -> int:
    """Return the epochs that have so many steps, of whole batches of the pairs that plans keep."""
    per_epoch = math.floor((1 - LEFT_OUT) * num_pairs / batch_size)
    return math.ceil(num_steps / per_epoch)


def read_runs(name: str) -> dict[Key, dict[str, Any]]:
    """Read the runs on a data set that have the settings of today.

    A setting that a run does not know is newer than the run, which had its default.
    """
    path = RUNS / f"{name}.jsonl"
    runs: dict[Key, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        run = json.loads(line)
        run["settings"] = {**list_defaults(), **run["settings"]}
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
    " and more. The learning rate ends at 0, so curves end flat; more steps are arms of their own."
    " Tiles of earth do not overlap, and a place there has one query: no radius, soft labels or"
    " hard positives. Fields of view and headings: benchmarks.field_of_view."
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
        return [f"to {against}: {count_noun(len(paired), 'pair')}", "", ""]
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
