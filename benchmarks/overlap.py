"""Measure how long the trainer waits for mining: with simulated costs, and in a real run.

python -m benchmarks.overlap [--epoch-s 1.0] [--epochs 12] [--data data/earth] [--simulated-only]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.support.record import record
from s4g_ray.config.loading import load_config, override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import RunError
from s4g_ray.pipeline.rounds.coordinator import Coordinator
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run import run

COSTS = (0.5, 1.0, 2.0)  # time of a mining round, in training intervals
SETTINGS = {
    "sync": ("sync", "wait"),
    "overlap, wait": ("overlap", "wait"),
    "overlap, reuse": ("overlap", "reuse"),
}


class Sleeper:
    """Runs rounds that only take time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def mine(self, epoch: int) -> None:  # noqa: ARG002
        """Sleep as long as a round takes."""
        time.sleep(self.seconds)

    def evaluate(self, epoch: int) -> None:
        """Do nothing: there is no evaluation."""

    def failed(self, what: str, epoch: int, attempt: int, error: RunError, last: bool) -> None:  # noqa: ARG002
        """Raise the error: no round is expected to fail."""
        raise error


def simulate(config: RunConfig, epoch_s: float, round_s: float) -> tuple[float, float, float]:
    """Run epochs and rounds that only sleep: seconds waited, seconds in all, mean age of graphs."""
    schedule = Schedule(config)
    ages: list[int] = []
    waited = 0.0
    finished = 0

    def choose(epoch: int) -> int:
        version = coordinator.graph_for(
            epoch, late=lambda: finished >= epoch - 1, check=lambda: None
        )
        assert version is not None
        return schedule.age(version, epoch)

    started = time.perf_counter()
    with Coordinator(schedule, Sleeper(round_s)) as coordinator, ThreadPoolExecutor(1) as planner:
        plans = {1: planner.submit(choose, 1)}
        for epoch in range(1, schedule.epochs + 1):
            if epoch not in plans:
                plans[epoch] = planner.submit(choose, epoch)
            if schedule.overlaps and epoch < schedule.epochs:
                plans[epoch + 1] = planner.submit(choose, epoch + 1)
            before = time.perf_counter()
            ages.append(plans[epoch].result())
            waited += time.perf_counter() - before
            time.sleep(epoch_s)
            finished = epoch
            if schedule.mines_after(epoch):
                coordinator.submit(epoch, mining=True, evaluating=False)
        seconds = time.perf_counter() - started
    return waited, seconds, sum(ages) / len(ages)


def measure_simulated(config: RunConfig, epoch_s: float) -> list[list[Any]]:
    """Measure the table of simulated costs."""
    rows = []
    for every, lag in ((1, 1), (4, 1), (4, 4)):
        for cost in COSTS:
            for name, (how, late) in SETTINGS.items():
                if how == "sync" and lag != 1:
                    continue
                if late == "reuse" and cost <= lag / every:
                    continue
                mining = {
                    "schedule": how,
                    "when_late": late,
                    "every_epochs": every,
                    "lag_epochs": lag,
                }
                made = config.model_copy(update={"mining": config.mining.model_copy(update=mining)})
                waited, seconds, age = simulate(made, epoch_s, cost * every * epoch_s)
                rows.append(
                    [every, lag, f"{cost:g}x", name, f"{waited / seconds:.1%}", f"{age:.1f}"]
                )
                print(rows[-1], flush=True)
    return rows


def measure_real(config: RunConfig) -> list[list[Any]]:
    """Run training under each schedule; the first epoch, in which actors start, is not counted."""
    rows = []
    for name in ("sync", "overlap"):
        with tempfile.TemporaryDirectory() as folder:
            made = override_config(config, [f"run_dir={folder}/run", f"mining.schedule={name}"])
            found = run(made).records
        epochs = [r for r in found if r["kind"] == "epoch"][1:]
        waited = sum(r["wait_s"] for r in epochs)
        trained = sum(r["load_s"] + r["step_s"] for r in epochs)
        rounds = [r for r in found if r["kind"] == "round" and "mine_s" in r]
        round_s = sum(r.get("embed_s", 0) + r["mine_s"] for r in rounds) / len(rounds)
        hidden = [r["mining_overlap"] for r in epochs if "mining_overlap" in r]
        rows.append(
            [
                name,
                f"{trained / len(epochs):.1f}",
                f"{round_s:.1f}",
                f"{waited / (waited + trained):.1%}",
                f"{sum(hidden) / len(hidden):.0%}",
                f"{waited + trained:.0f}",
            ]
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and record the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epoch-s", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--data", default="data/earth")
    parser.add_argument("--simulated-only", action="store_true")
    args = parser.parse_args()
    earth = load_config(
        "configs/earth.yaml", [f"data.uri={args.data}", f"train.epochs={args.epochs}"]
    )
    record_simulated(earth, args.epoch_s)
    if not args.simulated_only:
        record_real(earth)


def record_simulated(earth: RunConfig, epoch_s: float) -> None:
    """Record the table of simulated costs."""
    record(
        "overlap_simulated",
        title="Mining beside training: simulated costs",
        text=(
            "the run's own coordinator and schedule; epochs and rounds sleep. Cost: of a mining"
            " round, in training intervals (every_epochs epochs). Wait: the trainer's share of the"
            " wall time. A round is hidden when it takes no longer than lag_epochs epochs."
        ),
        command="python -m benchmarks.overlap",
        columns=[
            "every_epochs",
            "lag_epochs",
            "cost",
            "schedule",
            "trainer waits",
            "mean age of graph, epochs",
        ],
        rows=measure_simulated(earth, epoch_s),
        config={"epoch_s": epoch_s, "epochs": earth.train.epochs},
        order=75,
    )


def record_real(earth: RunConfig) -> None:
    """Record a real run under each schedule."""
    plain = [
        "evaluation.before_training=false",
        "evaluation.every_epochs=4",
        "evaluation.correlation_baseline=false",
    ]
    fixed = ["mining.exact_engine=torch", "train.precision=fp32", "train.channels_last=false"]
    small = override_config(earth, ["train.epochs=4", "mining.every_epochs=1", *plain, *fixed])
    record(
        "overlap_real",
        title="Mining beside training: a real run",
        text=(
            "configs/earth.yaml, a round after each epoch; training, embedding and searching share"
            " the cores of one machine, so what is hidden is not saved: it is paid by slower"
            " steps."
        ),
        command="python -m benchmarks.overlap",
        columns=[
            "schedule",
            "epoch, s",
            "round, s",
            "trainer waits",
            "round hidden",
            "all epochs, s",
        ],
        rows=measure_real(small),
        config={"epochs": 4, "every_epochs": 1, "lag_epochs": 1, "workers": 2},
        order=76,
    )


if __name__ == "__main__":
    main()
