"""Fork processes from one with their imports: a server, run as a script.

    python fork_server.py DESCRIPTOR MODULES

It listens on the socket of a file descriptor, after it has imported the modules of a JSON list. A
server of Ray's workers must not import Ray: Ray reads a worker's variables (the job, the raylet)
when it is imported, and draws the random ids of tasks from a state that forked processes would
share (two ranks then called an actor with the same id, and it died).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.fault_site.fork_request import FIRST, LENGTH, TOKEN_FD
else:  # as a script it knows its own folder alone
    from fork_request import FIRST, LENGTH, TOKEN_FD


class Server:
    """Forks a process for each connection, and sends its id and later its exit status there.

    A process whose connection closes is killed.
    """

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._running: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno())
        for readable in (listening, self._woken, sys.stdin):
            self._selector.register(readable, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve until standard input ends, then kill all processes."""
        while True:
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
                    if key.data in self._running:
                        os.kill(key.data, signal.SIGKILL)
            self._reap()

    def _answer(self) -> None:
        connection, _ = self._listening.accept()
        head, streams, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
        (length,) = LENGTH.unpack(head)
        request = json.loads(connection.recv(length, socket.MSG_WAITALL))
        self._fork(connection, request, streams)
        for stream in streams:
            os.close(stream)

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

    def _leave(self) -> None:
        """Close what is the server's, in a process that it has forked."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for other in (self._listening, self._woken, self._waker, *self._running.values()):
            other.close()

    def _reap(self) -> None:
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
    if "blocked" in request:
        os.setpgid(0, 0)  # a worker has a group of its own
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
    runpy.run_path(
        str(Path(__file__).with_name("sitecustomize.py"))
    )  # arms faults as at an interpreter's start


def _change_environment(environment: dict[str, str]) -> None:
    wanted = {**environment, **FIRST}
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    for name in wanted:
        if os.environ.get(name) != wanted[name]:
            os.environ[name] = wanted[name]


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a forked process need not copy what its collector would touch


def main() -> None:
    """Import the modules, then serve."""
    descriptor, modules = sys.argv[1:]
    _import(json.loads(modules))
    Server(socket.socket(fileno=int(descriptor))).serve()
    os._exit(0)  # libraries print what they have not freed


if __name__ == "__main__":
    main()
