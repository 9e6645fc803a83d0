"""Measure how long a run takes to recover from each fault: the table of docs/reliability.md.

python -m benchmarks.faults
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.record import record
from s4g_ray.config.schema import RunConfig
from tests.conftest import tiny_config, write_synthetic
from tests.support.faulty_runs import ENCODER, SHARD, TRAINER, Command, records, steps

EVERY_STEPS = 10
Row = list[str | int | float]


@dataclass
class Scene:
    """A long run of tiny epochs, and its progress as its records show it."""

    config: RunConfig
    command: Command

    @classmethod
    def start(cls, folder: Path, dataset: str) -> Scene:
        """Start a run whose workers train while mining rounds run beside them."""
        config = tiny_config(
            folder / "run",
            dataset,
            ray={"num_cpus": 4},
            train={"epochs": 400, "max_failures": 9},
            checkpoint={"every_steps": EVERY_STEPS},
            evaluation={"every_epochs": 400, "before_training": False},
            mining={
                "schedule": "overlap",
                "every_epochs": 5,
                "lag_epochs": 5,
                "exact_engine": "torch",
            },
        )
        return cls(config, Command(config))

    def find_last_step(self) -> int:
        """Return the last step that is logged."""
        return max([0, *steps(self.config)])

    def train_on(self, more: int = 25) -> None:
        """Wait until the run has made `more` steps."""
        goal = self.find_last_step() + more
        self.command.wait_for(lambda: self.find_last_step() >= goal)

    def measure_recovery(
        self, name: str, how: str, cause_fault: Callable[[], None], resume: bool = False
    ) -> Row:
        """Train for some steps, then cause the fault and measure the recovery."""
        self.train_on()
        before = len(records(self.config, "workers"))
        started = time.perf_counter()
        cause_fault()
        return self.await_recovery(name, how, started, before, resume)

    def await_recovery(self, name: str, how: str, started: float, before: int, resume: bool) -> Row:
        """Wait until training is past the step that it had reached, and return the table's row.

        resume: wait for the command to end and run it again with --resume. before: number of worker
        starts before the fault, used where the command itself recovers. Workers may train on for a
        moment after their driver has died; the steps that they publish count.
        """
        if resume:
            self.command.wait()
            before = len(records(self.config, "workers"))
        step = self.find_last_step()
        if resume:
            self.command = Command(self.config, resume=True)
        self.command.wait_for(lambda: len(records(self.config, "workers")) > before)
        newest = records(self.config, "workers")[-1]["after_step"]
        self.command.wait_for(lambda: self.find_last_step() > max(step, newest))
        row: Row = [
            name,
            how,
            f"{max(0, step - newest)} steps",
            round(time.perf_counter() - started, 1),
        ]
        print(row, flush=True)
        return row

    def measure_round_recovery(self, name: str, title: str) -> Row:
        """Kill a process that a round uses, and wait for the round's graph."""
        self.command.wait_for(lambda: self.command.processes(title))
        mined = len(records(self.config, "mining"))
        started = time.perf_counter()
        self.command.kill(title)
        self.command.wait_for(lambda: len(records(self.config, "mining")) > mined)
        row: Row = [name, "by itself", "its part", round(time.perf_counter() - started, 1)]
        print(row, flush=True)
        return row


def fail_while_publishing(
    scene: Scene, name: str, at: str, folder: Path, do: str = "kill", resume: bool = True
) -> Row:
    """Cause a fault while an object is published at `at`, and measure the recovery.

    do: kill the process, let its thread die, or fill the disk (full).
    """
    scene.command.end()
    marker = folder / f"{do}-{at.split()[0].strip('/').replace('/', '-')}"
    fault = {"at": at, "do": do, "marker": str(marker)}
    scene.command = Command(scene.config, [fault], resume=True)
    before = len(records(scene.config, "workers"))
    scene.command.wait_for(marker.exists, until_it_ends=True)
    started = time.perf_counter()
    if resume:
        return scene.await_recovery(name, "--resume", started, before, resume)
    # this command's own first start of workers is not the recovery
    return scene.await_recovery(name, "by itself", started, before + 1, resume)


def main() -> None:
    """Measure and record the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scene = Scene.start(folder, write_synthetic(folder / "data").uri)
        try:
            rows = measure(scene, folder)
        finally:
            scene.command.end()
    record(
        "faults",
        title="Recovery from faults",
        text=(
            f"a tiny run (96 pairs, steps of 0.1 s, a checkpoint every {EVERY_STEPS} steps, mining"
            " beside training) of the real command on this machine. Recovery: from the fault"
            " until training is past the step that it had reached, or the round has its graph;"
            " nearly all of it is the start of processes."
        ),
        command="python -m benchmarks.faults",
        columns=["fault", "recovers", "lost, done again", "recovery, s"],
        rows=rows,
        config={"workers": 2, "every_steps": EVERY_STEPS},
        order=78,
    )


def measure(scene: Scene, folder: Path) -> list[Row]:
    """Cause one fault after another in the same run."""
    command = scene.command
    rows = [
        scene.measure_recovery(
            "a training worker (kill -9)", "by itself", lambda: command.kill(TRAINER)
        ),
        scene.measure_recovery(
            "all training workers", "by itself", lambda: command.kill(TRAINER, 2)
        ),
        scene.measure_round_recovery("an embedding actor", f"{ENCODER}.encode"),
        scene.measure_round_recovery("an index shard", f"{SHARD}."),
        scene.measure_recovery(
            "the driver (kill -9)",
            "--resume",
            lambda: os.kill(command.process.pid, signal.SIGKILL),
            resume=True,
        ),
    ]
    stopped = scene.command
    rows.append(
        scene.measure_recovery(
            "SIGTERM", "--resume", lambda: stopped.process.send_signal(signal.SIGTERM), resume=True
        )
    )
    for name, at, do, resume in (
        ("the driver, publishing embeddings", "embeddings/v= _MANIFEST", "kill", True),
        ("the driver, publishing a graph", "/neighbors/v= _MANIFEST", "kill", True),
        ("the driver, publishing a plan", "plans/epoch=", "kill", True),
        ("the coordinator (its thread)", "/neighbors/v= _MANIFEST", "die", True),
        ("a full disk, until there is room", "checkpoints/step=", "full", True),
        ("a worker, publishing a checkpoint", "checkpoints/step= _MANIFEST", "kill", False),
    ):
        rows.append(fail_while_publishing(scene, name, at, folder, do, resume))
    return rows


if __name__ == "__main__":
    main()
