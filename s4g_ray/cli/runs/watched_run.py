"""WatchedRun: how a run stands, by the lease of its folder, run.json and its records."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from s4g_ray.amounts import format_duration
from s4g_ray.cli.runs.run_state import RunState, read_state
from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import InputError
from s4g_ray.pipeline.branches.branch_record import BRANCH_CONFIG, Branch
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.ownership.observer import LeaseObserver, Sighting

RUNNING = "running"
STOPPED = "stopped"  # not finished, and no process trains it


@dataclass(frozen=True)
class WatchedRun:
    """A run as it is now. again: the command that resumes it, where it was stopped."""

    state: RunState
    status: str  # running, stopped, done or replaced
    sighting: Sighting
    again: str | None = None

    @classmethod
    def read(cls, uri: str, sighting: Sighting) -> Self:
        """Read a run that has begun, after a look at its lease: a run is finished before that ends.

        Raises StoreError, and InputError for a configuration of another release.
        """
        info = files.read_json(files.join(uri, "run.json"))
        config = load_config(files.join(uri, "config.yaml"))
        state = read_state(uri, config.train.epochs)
        status = str(info["status"])
        if status != RUNNING:
            state.end_workers()
            return cls(state, status, sighting)
        if not sighting.is_written or sighting.since > (state.changed or 0.0):
            state.end_workers()  # those of this process have not begun
        if sighting.is_written:
            return cls(state, status, sighting)
        return cls(state, STOPPED, sighting, describe_resuming(uri, info, config))

    @property
    def is_running(self) -> bool:
        """Return whether a process trains it."""
        return self.status == RUNNING

    @property
    def is_stopped(self) -> bool:
        """Return whether it ended unfinished, and can be resumed."""
        return self.status == STOPPED

    def describe(self) -> str:
        """Describe in a line whether it goes on, or how it is resumed."""
        if self.is_running:
            verb = "running" if self.state.is_trained else "starting"
            return f"{self.state.uri}: {verb}, {self._describe_record()}"
        if self.again is None:
            return f"{self.state.uri}: {self.status}"
        text = f"{self.state.uri}: stopped after epoch {self.state.last_epoch}"
        text = f"{text} of {self.state.num_epochs}"
        if self.sighting.holder:
            text = f"{text}: {self.sighting.holder}: {self.sighting.ended}"
        return f"{text}; resume with: {self.again}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**self.state.as_dict(time.time()), "status": self.status, "resume": self.again}

    def _describe_record(self) -> str:
        if self.state.changed is None:
            return "no record yet"
        silent_s = max(0.0, time.time() - self.state.changed)
        return f"last record {format_duration(silent_s)} ago"


def describe_resuming(uri: str, info: Mapping[str, Any], config: RunConfig) -> str:
    """Return the command that resumes a run with the values that it was started with.

    Relative paths of its configuration start from the folder in which it was started.
    """
    path = files.join(uri, "config.yaml")
    if "branching" in info:  # it was stopped while it branched
        path = files.join(uri, Branch.from_record(info["branching"]).folder, BRANCH_CONFIG)
    overrides = []
    if files.absolute(config.run_dir) != uri:
        overrides.append(f"run_dir={uri}")
    data_uri = info["dataset"]["uri"]
    if files.absolute(config.data.uri) != data_uri:
        overrides.append(f"data.uri={data_uri}")
    return shlex.join(["s4g", "train", path, *overrides, "--resume"])


def await_run(
    uri: str, observer: LeaseObserver, reporter: Reporter, *, wait_s: float, pause_s: float
) -> None:
    """Wait until a run begins in a folder: for a process to take it, then for that one to begin.

    Each may take wait_s. Raises InputError where no run comes, and for a folder of other files.
    """
    holder: str | None = None
    deadline = 0.0
    while True:
        sighting = observer.look()
        content = set(files.list_content(uri))
        if "run.json" in content:
            return
        if content - {"config.yaml"}:  # that of a start
            raise InputError(f"{uri} holds no run, but other files; give the folder of a run")
        now = sighting.holder if sighting.is_written else ""
        if holder and not now:
            raise InputError(f"{holder} ended before it began the run in {uri}; see its output")
        if holder != now:
            holder = now
            deadline = time.monotonic() + wait_s
            if wait_s > 0:
                who = holder or "a process"
                reporter.line(f"waiting up to {wait_s:g} s for {who} to begin a run in {uri}")
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise _refuse_to_wait(uri, holder, wait_s)
        time.sleep(min(pause_s, left_s))


def _refuse_to_wait(uri: str, holder: str, wait_s: float) -> InputError:
    """Return the error of a folder in which no run has begun."""
    within = f" within {wait_s:g} s" if wait_s > 0 else " yet"
    if holder:
        return InputError(f"{holder} has begun no run in {uri}{within}; watch again later")
    return InputError(
        f"no run has begun in {uri}{within}; start one with `s4g train`, or correct the folder"
    )
