"""A `ray start --head` with token authentication; its Python has the dependencies, not s4g_ray."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.fault_site.agent_ports import free_ports
from tests.support.fault_site.fork_request import ADDRESS
from tests.support.forked_processes import DEPENDENCIES, SITE, serving

ROOT = Path(__file__).parents[2]
RAY = ("-m", "ray.scripts.scripts")
QUIET = ("--log-style=record", "--log-color=false")


@dataclass(frozen=True)
class Head:
    """The head, its dashboard's address, and the environment of who may submit jobs to it."""

    python: Path
    address: str
    environment: dict[str, str]

    def ray(
        self, command: str, *arguments: str, **changed: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `ray job COMMAND --address ...` in the repository's root; return all its output."""
        done = subprocess.run(
            [self.python, *RAY, "job", command, *QUIET, "--address", self.address, *arguments],
            text=True,
            cwd=ROOT,
            env={**self.environment, **changed},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=900,
            check=False,
        )
        print(done.stdout)  # shown with a test that fails
        return done

    def driver_log(self, job: str) -> str:
        """Return what the entrypoint of a job has printed so far."""
        logs = Path(self.environment["HOME"], "ray/session_latest/logs")
        path = logs / f"job-driver-{job}.log"
        return path.read_text() if path.exists() else ""

    def submit(
        self, *entrypoint: str, options: Sequence[str] = (), **changed: str
    ) -> subprocess.CompletedProcess[str]:
        """Submit this repository as a job; wait for its end unless an option forbids it."""
        return self.ray(
            "submit", "--working-dir", ".", *options, "--", "python", *entrypoint, **changed
        )


@contextmanager
def ray_head(num_cpus: int) -> Iterator[Head]:
    """Start it with ports and folders of its own; all that it has started ends with it.

    Its workers are forked from a process of its Python, with the dependencies imported.
    """
    with (
        # short: sockets lie there; an agent that ends may still write its log
        tempfile.TemporaryDirectory(prefix="s4g-", ignore_cleanup_errors=True) as name,
        ExitStack() as stack,
    ):
        folder, token = Path(name), secrets.token_hex(32)
        python = _dependencies_only(folder / "env")
        server = stack.enter_context(serving(DEPENDENCIES, python, str(SITE)))
        environment = {
            ADDRESS: server,
            "PYTHONPATH": str(SITE),
            "HOME": name,
            "PATH": f"{python.parent}:{os.defpath}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's own limits are short for a busy machine
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_worker_register_timeout_seconds": "300",
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_memory_monitor_refresh_ms": "0",
        }
        port, client, agent = free_ports(3)
        options = {
            "port": 0,
            "node-ip-address": "127.0.0.1",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": port,
            "ray-client-server-port": client,
            "dashboard-agent-listen-port": agent,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "num-cpus": num_cpus,
            "temp-dir": folder / "ray",
        }
        given = [f"--{key}={value}" for key, value in options.items()]
        command = [str(python), *RAY, "start", "--head", "--block", *given]
        with (folder / "head.log").open("wb") as log:
            head = subprocess.Popen(
                command, env=environment, cwd=name, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            _await_port(port, head, folder / "head.log")
            yield Head(python, f"http://127.0.0.1:{port}", environment)
        finally:
            _end(head, token, name)


def _dependencies_only(folder: Path) -> Path:
    """Make a Python with this one's packages, but without .pth files: no editable s4g_ray."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    installed = [path for path in sys.path if path.endswith("-packages")]
    (site / "dependencies.pth").write_text(
        "\n".join(installed) + "\n"
    )  # .pth files there are not read
    return folder / "bin/python"


def _await_port(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and head.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError(f"the head does not answer: {log.read_text()}")


def _end(head: subprocess.Popen[bytes], token: str, folder: str) -> None:
    """Find the head's processes by its token or its folder: titles may overwrite variables."""
    head.terminate()
    with suppress(subprocess.TimeoutExpired):
        head.wait(5)
    deadline = time.monotonic() + 60
    while (left := _holders(token, folder)) and time.monotonic() < deadline:
        for number in left:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.2)
    head.wait()


def _holders(token: str, folder: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            ours = token.encode() in (process / "environ").read_bytes()
            if ours or (process / "fd/1").readlink().is_relative_to(folder):
                found.append(int(process.name))
    return found
