"""Run the real command in a process of its own; find and kill its processes from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s4g_ray.config.loading import dump_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.pipeline.records import read_records
from s4g_ray.storage.manifest import open_published, read_part
from tests.conftest import NUM_TRAIN
from tests.support.fault_site.fork_request import TOKEN_FD
from tests.support.forked_processes import Forked, variables

TRAINER, SHARD, ENCODER = (
    "ray::RayTrainWorker",
    "ray::IndexShard",
    "ray::EncoderActor",
)  # titles of Ray's processes
# Ray's own, which outlive a killed driver by 15 s: agents, and processes about to start
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "default_worker.py", "fork_server.py")
LOOK_EVERY_S = 0.05  # a step takes longer; looking at all processes costs 10 ms of a processor
Fault = dict[str, str]
Process = subprocess.Popen[bytes] | Forked


@dataclass
class Command:
    """`s4g train` in a process of its own; its processes carry its token in their environment."""

    config: RunConfig
    faults: Sequence[Fault] = ()
    resume: bool = False
    module: str = "s4g_ray.cli.app"
    folder: Path | None = (
        None  # configuration and output lie beside it; the run's own, if not given
    )
    forked: bool = (
        True  # else an interpreter of its own, for variables that Ray reads when it is imported
    )
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        run = self.folder or Path(self.config.run_dir)
        run.parent.mkdir(parents=True, exist_ok=True)
        config = run.with_suffix(".yaml")
        config.write_text(dump_config(self.config))
        environment = {
            **os.environ,
            **variables(),
            "S4G_TOKEN": self.token,
            "S4G_FAULTS": json.dumps(list(self.faults)),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            # a node that is killed is dead after 1.5 s instead of 15
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "3",
            # agents that outlive a killed driver look for its server so long instead of 60 s
            "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
        }
        command = ["train"] if self.module == "s4g_ray.cli.app" else []
        arguments = [*command, str(config), *["--resume"] * self.resume]
        self._log = run.with_suffix(f".{self.token[:6]}.log")
        self._log.touch()
        self.process = (self._fork if self.forked else self._start)(arguments, environment)

    def _fork(self, arguments: list[str], environment: dict[str, str]) -> Process:
        return Forked(self.module, arguments, environment, self._log)

    def _start(self, arguments: list[str], environment: dict[str, str]) -> Process:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", self.module, *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def wait(self, timeout_s: float = 900) -> int:
        """Wait for the exit status; kill a command that does not end, with all its processes."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"still running after {timeout_s:g} s: {self.output}") from None

    def end(self) -> None:
        """Kill it and all that it started."""
        for number in [self.process.pid, *self.processes()]:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.wait()

    def wait_for(
        self, what: Callable[[], Any], timeout_s: float = 900, until_it_ends: bool = False
    ) -> None:
        """Wait until something has happened; fail if the command ends first, unless allowed."""
        deadline = time.monotonic() + timeout_s
        while not what():
            ended = self.process.poll() is not None
            if (ended and not until_it_ends) or time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"it never came to that: {self.output}")
            time.sleep(LOOK_EVERY_S)

    def processes(self, title: str = "") -> list[int]:
        """Ids of the living processes that it started, of a title."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if not self._is_ours(folder):
                    continue
                named = (
                    (folder / "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode()
                    .startswith(title)
                )
                alive = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
            except OSError:  # it has ended meanwhile
                continue
            if named and alive and int(folder.name) != self.process.pid:
                found.append(int(folder.name))
        return found

    def _is_ours(self, folder: Path) -> bool:
        """Whether a process has the command's token; raises OSError when it has ended."""
        if f"S4G_TOKEN={self.token}".encode() in (folder / "environ").read_bytes():
            return True
        with suppress(FileNotFoundError):
            return self.token in str((folder / "fd" / str(TOKEN_FD)).readlink())
        return False

    def kill(self, title: str, count: int = 1) -> None:
        """Kill so many of its processes of a title, as soon as there are so many."""
        found: list[int] = []

        def look() -> bool:
            found[:] = sorted(self.processes(title))[:count]
            return len(found) == count

        self.wait_for(look)
        for number in found:
            os.kill(number, signal.SIGKILL)

    def kill_while_held(self, fault: Fault, title: str) -> None:
        """Kill its process of a title while that waits in a held write; then let the write pass."""
        marker = Path(fault["marker"])
        self.wait_for(marker.with_name(f"{marker.name}.held").exists)
        self.kill(title)
        marker.touch()

    def left_behind(self, within_s: float = 60, but: Sequence[str] = ()) -> list[str]:
        """Titles of processes that outlive the command by so long, some titles left out."""
        deadline = time.monotonic() + within_s
        while True:
            titles = [title for title in map(title_of, self.processes()) if title != "Z"]
            left = [title for title in titles if not any(name in title for name in but)]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)


def held(at: str, marker: str | Path) -> Fault:
    """Delay the write of an object until the marker exists: so long a run cannot pass it."""
    return {"at": at, "do": "hold", "marker": str(marker)}


def title_of(number: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:  # it has ended meanwhile
        return "Z"


def records(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    """Lines of a kind in metrics.jsonl; none before it is there."""
    return [record for record in read_records(config.run_dir) if record["kind"] == kind]


def steps(config: RunConfig) -> list[int]:
    """The steps that are logged."""
    return [record["step"] for record in records(config, "step")]


def assert_same_end(config: RunConfig, whole: RunConfig) -> None:
    """Assert equal weights, optimiser and plans; each step is logged once, no file is torn."""
    ours, theirs = (Path(c.run_dir) for c in (config, whole))
    name = f"checkpoints/epoch={config.train.epochs:04d}"
    assert (ours / name / "model.safetensors").read_bytes() == (
        theirs / name / "model.safetensors"
    ).read_bytes()
    states = [
        torch.load(run / name / "training_state.pt", weights_only=True) for run in (ours, theirs)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert steps(config) == list(
        range(1, config.train.epochs * (NUM_TRAIN // config.train.batch_size) + 1)
    )
    wanted = {
        "epoch": ("epoch", "loss", "graph", "hardness", "step"),
        "evaluation": ("epoch", "recall@1"),
    }
    for kind, keys in wanted.items():
        logged = [[[r[key] for key in keys] for r in records(c, kind)] for c in (config, whole)]
        assert logged[0] == logged[1]
    for plan in (theirs / "plans").iterdir():
        assert (ours / "plans" / plan.name).read_bytes() == plan.read_bytes()
    for folder in ("neighbors", "checkpoints", "embeddings"):
        names = [sorted(path.name for path in (run / folder).iterdir()) for run in (ours, theirs)]
        assert names[0] == names[1]
        for version in (ours / folder).iterdir():
            kind = {
                "neighbors": "neighbors",
                "checkpoints": "checkpoint",
                "embeddings": "embeddings",
            }[folder]
            for part in open_published(str(version), kind).parts:
                read_part(str(version), part)
