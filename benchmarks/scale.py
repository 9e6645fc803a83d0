"""Run every stage of a run for real, at 10^5 and 10^6 places, and measure what it takes.

    python -m benchmarks.scale [--places 100000 400000] [--kinds flat ivf_sq8] [--shards 1 4 8]

Packed tiles of 16 pixels, timm's test_resnet, D = 64, positions in cities, ids in the order
of the cities. Each stage is a process of its own, the driver, with a Ray of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support import scale_stages
from benchmarks.support.process_watch import ProcessWatch, RoleUse
from benchmarks.support.record import Cell, record

TRAINED_STEPS = 100
COLUMNS = (
    "places",
    "stage",
    "wall s",
    "driver CPU s",
    "tasks CPU s",
    "driver us/place",
    "driver GB",
    "rank, shard or task GB",
    "files",
    "MB",
    "spilled MB",
    "notes",
)


@dataclass(frozen=True)
class StageUse:
    """What a stage took."""

    name: str
    wall_s: float
    roles: dict[str, RoleUse]
    num_files: int
    num_bytes: int
    spilled: int
    counts: dict[str, Any]

    def row(self, places: int) -> list[Cell]:
        """Return the row of the table."""
        none = RoleUse()
        driver = self.roles.get("driver", none)
        others = [use for role, use in self.roles.items() if role not in ("driver", "ray")]
        return [
            places,
            self.name,
            round(self.wall_s, 1),
            round(driver.cpu_s, 1),
            round(sum(use.cpu_s for use in others), 1),
            round(1e6 * driver.cpu_s / places, 1),
            round(driver.peak_gb, 2),
            round(max((use.peak_gb for use in others), default=0.0), 2),
            self.num_files,
            round(self.num_bytes / 1e6),
            round(self.spilled / 1e6),
            ", ".join(f"{key} {value}" for key, value in self.counts.items()) or "-",
        ]


class Trial:
    """The stages at one number of places, in a folder of their own."""

    def __init__(self, folder: Path, places: int) -> None:
        self.folder = folder
        self.places = places
        self.uses: list[StageUse] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._config = scale_stages.write_config(folder)

    def run_stage(self, label: str, name: str, *arguments: str, output: str = "") -> None:
        """Run a stage of scale_stages."""
        command = [sys.executable, "-m", "benchmarks.support.scale_stages"]
        self._run(label, [*command, name, str(self.folder), *arguments], output)

    def run_command(self, label: str, *arguments: str, output: str) -> None:
        """Run a command of s4g."""
        self._run(label, [sys.executable, "-m", "s4g_ray.cli.app", *arguments], output)

    def train(self) -> None:
        """Train until TRAINED_STEPS steps are logged, then ask for a checkpoint and the end."""
        command = [sys.executable, "-m", "s4g_ray.cli.app", "train", str(self._config)]
        metrics = self.folder / "run" / "metrics.jsonl"

        def stop_when_trained(process: subprocess.Popen[str]) -> None:
            while process.poll() is None:
                time.sleep(0.2)
                if _last_step(metrics) >= TRAINED_STEPS:
                    process.send_signal(signal.SIGTERM)
                    return

        self._run("train", command, "run", stop_when_trained, may_fail=True)

    def _run(
        self,
        label: str,
        command: Sequence[str],
        output: str,
        meanwhile: Any = None,
        *,
        may_fail: bool = False,
    ) -> None:
        """Run a process under the watch, and keep what it took."""
        ray_dir = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        environment = {**os.environ, "RAY_TMPDIR": str(ray_dir), "RAY_AUTH_MODE": "disabled"}
        log = self.folder / f"{label.replace(' ', '-')}.log"
        started = time.perf_counter()
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            with ProcessWatch(process.pid, spill_dir=ray_dir) as watch:
                if meanwhile is not None:
                    meanwhile(process)
                printed, _ = process.communicate()
        wall_s = time.perf_counter() - started
        shutil.rmtree(ray_dir, ignore_errors=True)
        if process.returncode and not may_fail:
            raise SystemExit(f"{label} failed ({process.returncode}): {_last_line(log)}; {log}")
        counts = _read_counts(printed)
        wall_s = counts.pop("seconds", wall_s)
        files = [path for path in (self.folder / output).rglob("*") if path.is_file()]
        num_files = len(files) if output else 0
        num_bytes = sum(path.stat().st_size for path in files) if output else 0
        use = StageUse(label, wall_s, watch.uses(), num_files, num_bytes, watch.spilled, counts)
        self.uses.append(use)
        print(use.row(self.places), flush=True)


def _last_step(metrics: Path) -> int:
    """Return the last step that a run has logged."""
    if not metrics.exists():
        return 0
    lines = metrics.read_text().splitlines()
    steps = [json.loads(line).get("step", 0) for line in lines if '"step"' in line]
    return max(steps, default=0)


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1][:200] if lines else "no message"


def _read_counts(printed: str) -> dict[str, Any]:
    lines = printed.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return {}
    found: dict[str, Any] = json.loads(lines[-1])
    return found if "seconds" in found else {}


def compute_driver_rates(trials: Sequence[Trial]) -> dict[str, float]:
    """Return the driver's processor time by stage, in microseconds a place.

    With two trials the difference between them: without imports and what is done once.
    """
    small, large = trials[0], trials[-1]
    rates = {}
    for first, last in zip(small.uses, large.uses, strict=True):
        spent = last.roles["driver"].cpu_s
        places = large.places
        if small is not large:
            spent -= first.roles["driver"].cpu_s
            places -= small.places
        rates[last.name] = round(1e6 * max(spent, 0.0) / places, 2)
    return rates


def run_trial(trial: Trial, kinds: Sequence[str], shards: Sequence[int], mined: str) -> None:
    """Run all stages."""
    trial.run_stage("write data", "write_data", str(trial.places), output="data")
    trial.run_stage("open", "open")
    trial.run_stage("geographic graph", "graph", output="stages/neighbors")
    trial.run_stage("plan (geographic)", "plan", output="stages/plans")
    trial.train()
    shutil.rmtree(trial.folder / "embeddings", ignore_errors=True)
    source = str(trial.folder / "run")
    data = str(trial.folder / "data")
    table = str(trial.folder / "embeddings")
    embedded = ["embed", source, data, table, "--split", "train", "ray.num_cpus=4"]
    trial.run_command("embed", *embedded, output="embeddings")
    trial.run_stage("ids", "ids")
    for kind in kinds:
        for num_shards in shards:
            output = f"index-{kind}-{num_shards}"
            trial.run_stage(
                f"index {kind} x{num_shards}", "index", kind, str(num_shards), output=output
            )
            shutil.rmtree(trial.folder / output, ignore_errors=True)
    graph = str(trial.folder / "stages/neighbors/v=0001")
    settings = ["mining.scope=cells"]
    if mined != "cells":
        settings = [f"mining.index_kind={mined}", "mining.min_recall=0.5", "mining.num_shards=2"]
    settings += [
        "mining.index_threads=1",
        f"sampling.neighbor_pool_size={scale_stages.K}",
        "ray.num_cpus=4",
    ]
    mine = ["mine", table, graph, *settings, "--dataset", data]
    trial.run_command("mine", *mine, output="stages/neighbors/v=0001")
    trial.run_stage("plan (mined)", "plan", "1", output="stages/plans")


def join_counts(counts: list[int]) -> str:
    """Return counts as words."""
    return " and ".join(f"{count:,}" for count in counts)


def main() -> None:
    """Run the trials, record them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, nargs="+", default=[100_000, 400_000])
    parser.add_argument("--kinds", nargs="+", default=["flat", "ivf_sq8"])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--mined", default="ivf_sq8", help="kind of index to mine with, or cells")
    parser.add_argument("--folder", type=Path, help="keep all files here")
    parser.add_argument("--name", default="scale", help="name of the result")
    given = parser.parse_args()
    trials = []
    with tempfile.TemporaryDirectory() as temporary:
        for places in given.places:
            trial = Trial((given.folder or Path(temporary)) / str(places), places)
            run_trial(trial, given.kinds, given.shards, given.mined)
            trials.append(trial)
    record(
        given.name,
        title=f"Every stage of a run of {join_counts(given.places)} places",
        text=(
            "packed 16-pixel tiles, timm's test_resnet, D = 64, ids in the order of the"
            " cities that places lie in. Wall time includes starting Ray for commands (train,"
            " embed, mine), not for the other stages; processor time includes all imports. GB is"
            " the private memory of the largest process of its kind."
        ),
        command="python -m benchmarks.scale",
        columns=COLUMNS,
        rows=[use.row(trial.places) for trial in trials for use in trial.uses],
        config={
            "k": scale_stages.K,
            "dim": scale_stages.DIM,
            "steps": TRAINED_STEPS,
            "mined with": given.mined,
        },
        rates=compute_driver_rates(trials),
        order=90,
    )


if __name__ == "__main__":
    main()
