"""Fork commands and Ray's workers from a process with a run's imports.

They take 7 s of a processor in each process, and a command has ten of them. A Python that finds
fault_site/ on its PYTHONPATH and a server's address in S4G_FORK_SERVER, and is to become a worker
of Ray, lets the server fork the worker, and waits for its end.

Ray reads a worker's variables (the job, the raylet) when it is imported. So workers come from a
server of their own that has imported all but Ray. It forks a server for each raylet and job, which
imports Ray, and forks the workers.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.fault_site.fork_request import (
    ADDRESS,
    LENGTH,
    TOKEN_FD,
    receive_number,
    send_request,
    session_address,
)

SITE = Path(__file__).parent / "fault_site"
ROOT = SITE.parents[2]
# Ray finds where to write a title from the first variable's place, which no process may change
FIRST = {"S4G_FORKED": "1"}
IMPORTED = {
    "commands": (
        "s4g_ray.cli.app",
        "s4g_ray.pipeline.driver",
        "ray.data",
        "ray.util.state",
        "ray.cluster_utils",
        "tests.support.faulty_runs",
    ),
    "workers": (
        "pandas",
        "pyarrow.dataset",
        "pyarrow.parquet",
        "timm",
        "torch.distributed",
        "s4g_ray.data.train_split",
        "s4g_ray.encoder.checkpoint",
        "s4g_ray.evaluation.metrics",
        "s4g_ray.index.vector_index",
        "s4g_ray.mining.candidates",
        "s4g_ray.sampling.sampler",
        "s4g_ray.training.step",
    ),
    "session": (
        "ray._private.node",
        "ray._private.async_compat",
        "ray.data",
        "ray.train.v2._internal.execution.controller",
        "s4g_ray.encoder.embedding_job",
        "s4g_ray.index.sharded.service",
        "s4g_ray.mining.mining_job",
        "s4g_ray.sampling.cell_tasks",
        "s4g_ray.training.trainer",
        "s4g_ray.training.worker",
    ),
}


class Forked:
    """`python -m MODULE ARGUMENTS`, but forked; used as a subprocess.Popen.

    Ray has read its variables by then: RAY_... of `environment` reach the session's other
    processes, not this one.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        request = {
            "module": module,
            "arguments": list(arguments),
            "environment": {**environment, **variables()},
            "folder": os.getcwd(),
        }
        with log.open("wb") as out, Path(os.devnull).open("rb") as nothing:
            streams = [nothing.fileno(), out.fileno(), out.fileno()]
            self._connection = send_request(start_server("commands"), request, streams)
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
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


@functools.cache
def start_server(name: str) -> str:
    """Start a server of this process, once; it ends with it. Returns its address."""
    address = str(Path(tempfile.gettempdir(), f"s4g-fork-{secrets.token_hex(4)}"))
    listening = listen(address)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fork_server", name, address, str(listening.fileno())],
        stdin=subprocess.PIPE,  # its end is ours
        env={**FIRST, **os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        pass_fds=[listening.fileno()],
    )
    listening.close()
    atexit.register(_end_server, server, address)
    return address


def listen(address: str) -> socket.socket:
    """Listen at an address; who asks before the server has imported everything waits."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(address)
    listening.listen(64)
    return listening


def _end_server(server: subprocess.Popen[bytes], address: str) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    Path(address).unlink(missing_ok=True)


def python_path() -> str:
    """The PYTHONPATH of a process that finds fault_site/."""
    paths = [str(SITE), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(filter(None, paths)))


def variables() -> dict[str, str]:
    """Variables of a session of Ray whose workers the server forks."""
    return {ADDRESS: start_server("workers"), "PYTHONPATH": python_path()}


class Server:
    """Forks a process for each connection, and sends its id and later its exit status there.

    A process whose connection closes is killed.
    """

    def __init__(self, listening: socket.socket, address: str = "") -> None:
        self._address = address  # of the servers of sessions, where it forks them
        self._listening = listening
        self._servers: dict[str, int] = {}  # processes of the servers of sessions
        self._running: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno())
        for readable in (listening, self._woken, sys.stdin):
            self._selector.register(readable, selectors.EVENT_READ)

    def serve(self, raylet: int | None = None) -> None:
        """Serve until standard input ends, then kill all processes; or until the raylet's end."""
        ended = None
        if raylet is not None:
            with suppress(ProcessLookupError):
                ended = os.pidfd_open(raylet)
                self._selector.register(ended, selectors.EVENT_READ)
        while self._running or raylet is None or ended is not None:
            for key, _ in self._selector.select():
                if key.fileobj is self._listening:
                    self._answer()
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                elif key.fileobj is sys.stdin:
                    for number in self._running:
                        os.kill(number, signal.SIGKILL)
                    return
                else:
                    self._selector.unregister(key.fileobj)
                    if key.fileobj == ended:
                        ended = None
                    elif key.data in self._running:
                        os.kill(key.data, signal.SIGKILL)
            self._reap()

    def _answer(self) -> None:
        connection, _ = self._listening.accept()
        head, streams, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
        (length,) = LENGTH.unpack(head)
        request = json.loads(connection.recv(length, socket.MSG_WAITALL))
        session = session_address(self._address, request) if self._address else ""
        if not session:
            self._fork(connection, request, streams)
        for stream in streams:
            os.close(stream)
        if session:
            self._start_session(session, connection, request["environment"])

    def _fork(
        self, connection: socket.socket, request: dict[str, Any], streams: Sequence[int]
    ) -> None:
        number = os.fork()
        if number == 0:
            connection.close()
            self._leave()
            _run(request, streams)
        connection.sendall(struct.pack("!i", number))
        self._running[number] = connection
        self._selector.register(connection, selectors.EVENT_READ, number)

    def _start_session(
        self, address: str, connection: socket.socket, environment: dict[str, str]
    ) -> None:
        """Fork the server of a session, unless it runs; refer who asks to it."""
        listening = None if address in self._servers else listen(address)
        connection.sendall(struct.pack("!i", 0))
        connection.close()
        if listening is None:
            return
        number = os.fork()
        if number == 0:
            self._leave()
            _serve_session(listening, environment)
        listening.close()
        self._servers[address] = number

    def _leave(self) -> None:
        """Close what is the server's, in a process that it has forked."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for other in (self._listening, self._woken, self._waker, *self._running.values()):
            other.close()

    def _reap(self) -> None:
        for address, number in list(self._servers.items()):
            if os.waitpid(number, os.WNOHANG)[0]:
                del self._servers[address]
                Path(address).unlink(missing_ok=True)
        for number in list(self._running):
            ended, status = os.waitpid(number, os.WNOHANG)
            if not ended:
                continue
            connection = self._running.pop(number)
            with suppress(KeyError):  # closed by the other side
                self._selector.unregister(connection)
            with suppress(OSError):
                connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
            connection.close()


def _serve_session(listening: socket.socket, environment: dict[str, str]) -> None:
    """Become the server of a session: import Ray with its variables, then serve."""
    status = 1
    try:
        _change_environment(environment)
        _import("session")
        Server(listening).serve(int(environment["RAY_RAYLET_PID"]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _run(request: dict[str, Any], streams: Sequence[int]) -> None:
    """Become the process: group, streams, variables, arguments; end as an interpreter does."""
    status = 1
    try:
        _become(request, streams)
        if "script" in request:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            importlib.import_module(request["module"]).main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _become(request: dict[str, Any], streams: Sequence[int]) -> None:
    import numpy as np

    if "group" in request:
        os.setpgid(0, request["group"])
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    environment = request["environment"]
    _change_environment(environment)
    os.chdir(request["folder"])
    # /proc shows the server's variables
    token = os.memfd_create(environment.get("S4G_TOKEN", ""), 0)
    os.dup2(token, TOKEN_FD)
    os.close(token)
    sys.argv = [request.get("script") or request["module"], *request["arguments"]]
    sys.path[:] = request.get("path", sys.path)
    np.random.seed()  # else each process draws the same numbers
    runpy.run_path(str(SITE / "sitecustomize.py"))  # arms faults as at an interpreter's start


def _change_environment(environment: dict[str, str]) -> None:
    wanted = {**environment, **FIRST}
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    for name in wanted:
        if os.environ.get(name) != wanted[name]:
            os.environ[name] = wanted[name]


def _import(name: str) -> None:
    for module in IMPORTED[name]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a forked process need not copy what its collector would touch


def main() -> None:
    """Import everything, then serve on the socket that is given as a file descriptor."""
    name, address, number = sys.argv[1:]
    _import(name)
    listening = socket.socket(fileno=int(number))
    if name == "commands":
        Server(listening).serve()
    else:
        assert "ray" not in sys.modules
        Server(listening, address).serve()
    os._exit(0)  # libraries print what they have not freed


if __name__ == "__main__":
    main()
