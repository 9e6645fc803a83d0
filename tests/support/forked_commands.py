"""Fork commands from a process with a run's imports, which take 7 s of a processor each time."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SITE = Path(__file__).parent / "fault_site"
IMPORTED = (
    "s4g_ray.cli.app",
    "s4g_ray.pipeline.driver",
    "ray.data",
    "ray.util.state",
    "ray.cluster_utils",
    "tests.support.faulty_runs",
)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*IMPORTED])


class Forked:
    """`python -m MODULE ARGUMENTS`, but forked; used as a subprocess.Popen.

    Ray has read its variables by then: RAY_... of `environment` reach the session's other
    processes, not this one.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        # a daemon: multiprocessing ends it with the tests instead of waiting for it
        self._process = CONTEXT.Process(
            target=_run, args=(module, arguments, dict(environment), log), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, below zero that of a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As returncode."""
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit status once it has ended. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout_s)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout_s or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _run(module: str, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """Become the command: variables, arguments, output; arm faults as at an interpreter's start."""
    os.environ.clear()
    os.environ.update(environment)
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = [module, *arguments]
    runpy.run_path(str(SITE / "sitecustomize.py"))
    try:
        importlib.import_module(module).main()
    finally:
        atexit._run_exitfuncs()  # a forked process would leave them out
