"""Runs of the real command in a process of their own, their processes found and killed from outside."""

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

from s4g_ray.config.loading import dump_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.pipeline.run_folder import read_records

SITE = Path(__file__).parent / "fault_site"
TRAINER, SHARD, ENCODER = (
    "ray::RayTrainWorker",
    "ray::IndexShard",
    "ray::EncoderActor",
)  # titles of Ray's processes
# Ray's own, which outlive a driver that is killed by a minute: its agents, and processes that were about to start
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "default_worker.py")
Fault = dict[str, str]


@dataclass
class Command:
    """`s4g train` in a process of its own; all processes that it starts carry its token in their environment."""

    config: RunConfig
    faults: Sequence[Fault] = ()
    resume: bool = False
    module: str = "s4g_ray.cli.app"
    folder: Path | None = (
        None  # configuration and output lie beside it; the run's own, if not given
    )
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        run = self.folder or Path(self.config.run_dir)
        run.parent.mkdir(parents=True, exist_ok=True)
        config = run.with_suffix(".yaml")
        config.write_text(dump_config(self.config))
        paths = [str(SITE), str(SITE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "S4G_TOKEN": self.token,
            "S4G_FAULTS": json.dumps(list(self.faults)),
            "PYTHONPATH": os.pathsep.join(paths),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        }
        command = ["train"] if self.module == "s4g_ray.cli.app" else []
        arguments = [
            sys.executable,
            "-m",
            self.module,
            *command,
            str(config),
            *["--resume"] * self.resume,
        ]
        self._log = run.with_suffix(f".{self.token[:6]}.log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                arguments, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def wait(self, timeout_s: float = 400) -> int:
        """Its exit status, once it has ended; a command that does not is killed, with all that it started."""
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
        self, what: Callable[[], Any], timeout_s: float = 400, until_it_ends: bool = False
    ) -> None:
        """Until something has happened; fails when the command ends before, unless that may be how it happens."""
        deadline = time.monotonic() + timeout_s
        while not what():
            ended = self.process.poll() is not None
            if (ended and not until_it_ends) or time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"it never came to that: {self.output}")
            time.sleep(0.01)

    def processes(self, title: str = "") -> list[int]:
        """Ids of the living processes that it started, of a title."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"S4G_TOKEN={self.token}".encode() not in (folder / "environ").read_bytes():
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

    def kill(self, title: str, count: int = 1) -> None:
        """Kill so many of its processes of a title, as soon as there are so many."""
        self.wait_for(lambda: len(self.processes(title)) >= count)
        for number in sorted(self.processes(title))[:count]:
            os.kill(number, signal.SIGKILL)

    def left_behind(self, within_s: float = 20, but: Sequence[str] = ()) -> list[str]:
        """Titles of processes that outlive the command by so long, some titles left out."""
        deadline = time.monotonic() + within_s
        while True:
            titles = [title for title in map(title_of, self.processes()) if title != "Z"]
            left = [title for title in titles if not any(name in title for name in but)]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)


def title_of(number: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except FileNotFoundError:  # it has ended meanwhile
        return "Z"


def records(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    """Lines of a kind in metrics.jsonl; none before it is there."""
    return [record for record in read_records(config.run_dir) if record["kind"] == kind]


def steps(config: RunConfig) -> list[int]:
    """The steps that are logged."""
    return [record["step"] for record in records(config, "step")]
