"""Fork commands and Ray's workers from a process with their imports (fault_site/fork_server.py).

The imports of a run take 7 s of a processor in each process, and a command has ten processes. A
Python that is to become a worker of Ray, and finds fault_site/ on its PYTHONPATH and a server's
address in S4G_FORK_SERVER, lets the server fork the worker, and waits for its end.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.support.fault_site.fork_request import (
    ADDRESS,
    FIRST,
    listen,
    receive_number,
    send_request,
)

SITE = Path(__file__).parent / "fault_site"
ROOT = SITE.parents[2]
COMMANDS = (
    "s4g_ray.cli.app",
    "s4g_ray.pipeline.driver",
    "ray.data",
    "ray.util.state",
    "ray.cluster_utils",
    "tests.support.faulty_runs",
)
DEPENDENCIES = (
    "fsspec",
    "numba",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pydantic",
    "timm",
    "torch.distributed",
    "yaml",
)
# none of them imports Ray: see fork_server.py
WORKERS = (
    *DEPENDENCIES,
    "s4g_ray.data.train_split",
    "s4g_ray.encoder.checkpoint",
    "s4g_ray.evaluation.metrics",
    "s4g_ray.index.vector_index",
    "s4g_ray.mining.candidates",
    "s4g_ray.sampling.sampler",
    "s4g_ray.training.step",
)


class Forked:
    """`python -m MODULE ARGUMENTS`, but forked; used as a subprocess.Popen.

    Ray has read its variables by then: RAY_... of `environment` reach the session's other
    processes, not this one.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        errors: Path | None = None,  # else standard error goes to the log, too
    ) -> None:
        request = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(Path.cwd()),
        }
        with (
            Path(os.devnull).open("rb") as nothing,
            log.open("ab") as out,
            (errors or log).open("ab") as error,
        ):
            streams = [nothing.fileno(), out.fileno(), error.fileno()]
            self._connection = send_request(start_server(COMMANDS), request, streams)
        self.pid = receive_number(self._connection)
        self.returncode: int | None = None  # below zero: that of a signal

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit status once it has ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout_s):
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout_s or 0.0)
            self.returncode = receive_number(self._connection)
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


@contextmanager
def serving(
    modules: Sequence[str],
    python: Path | str = sys.executable,
    path: str = "",
) -> Iterator[str]:
    """A server; it ends with this process, and its processes with it. Yields its address."""
    address = str(Path(tempfile.gettempdir(), f"s4g-fork-{secrets.token_hex(4)}"))
    listening = listen(address)
    server = subprocess.Popen(
        [
            python,
            str(SITE / "fork_server.py"),
            str(listening.fileno()),
            json.dumps(modules),
        ],
        stdin=subprocess.PIPE,  # its end is ours
        # Ray starts workers with one thread
        env={**FIRST, **os.environ, "PYTHONPATH": path or python_path(), "OMP_NUM_THREADS": "1"},
        pass_fds=[listening.fileno()],
    )
    listening.close()
    try:
        yield address
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
        Path(address).unlink()


@functools.cache
def start_server(modules: Sequence[str]) -> str:
    """Start a server that ends with this process; only once. Returns its address."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(serving(modules))


def python_path() -> str:
    """The PYTHONPATH of a process that finds fault_site/."""
    paths = [str(SITE), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(filter(None, paths)))


def variables() -> dict[str, str]:
    """Variables of a session of Ray whose workers the server forks."""
    return {ADDRESS: start_server(WORKERS), "PYTHONPATH": python_path()}
