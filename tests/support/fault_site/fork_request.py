"""Ask a fork server (fork_server.py) for a process. Imports nothing slow."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

ADDRESS = "S4G_FORK_SERVER"  # the variable with the server's socket
TOKEN_FD = 999  # a forked process shows the token of its command in the name of this file
# Ray finds where to write a title from the place of the first variable, which must not change
FIRST = {"S4G_FORKED": "1"}
CONTEXT = "--serialized-runtime-env-context="
LENGTH = struct.Struct("!I")


def listen(address: str) -> socket.socket:
    """Listen at an address; who asks before the server has imported everything waits."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(address)
    listening.listen(64)
    return listening


def send_request(address: str, request: dict[str, Any], streams: list[int]) -> socket.socket:
    """Ask for a process with three streams; return the connection, open while it runs."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    text = json.dumps(request).encode()
    socket.send_fds(connection, [LENGTH.pack(len(text))], streams)
    connection.sendall(text)
    return connection


def receive_number(connection: socket.socket) -> int:
    """Receive the process's id, then its exit status. Raises ConnectionError without a server."""
    data = connection.recv(LENGTH.size, socket.MSG_WAITALL)
    if len(data) < LENGTH.size:
        raise ConnectionError("the fork server has ended")
    return int(struct.unpack("!i", data)[0])


def worker_command(words: list[str]) -> tuple[list[str], dict[str, str]] | None:
    """The script of a worker with its arguments, and variables that its runtime environment adds.

    None for the command of another process, and for a worker with more in its environment.
    """
    scripts = [i for i, word in enumerate(words) if word.endswith("/default_worker.py")]
    if not scripts:
        return None
    arguments = []
    context: dict[str, Any] = {}
    for word in words[scripts[0] :]:
        if word.startswith(CONTEXT):
            context = json.loads(word.removeprefix(CONTEXT))
        elif not word.startswith("--language="):
            arguments.append(word)
    added = context.pop("env_vars", None) or {}
    python = context.pop("py_executable", None) or sys.executable
    if any(context.values()) or python != sys.executable or "$" in "".join(added.values()):
        return None
    return arguments, added


def replace_process(address: str) -> None:
    """Let a forked process do a worker's work; end when it ends, with its exit status.

    Does nothing in a process that is to become no worker.
    """
    found = worker_command(sys.orig_argv)
    if found is None:
        return
    (script, *arguments), added = found
    request = {
        "script": script,
        "arguments": arguments,
        "environment": {**os.environ, **added},
        "folder": str(Path.cwd()),
        "path": [str(Path(script).parent), *sys.path],
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }
    connection = send_request(address, request, [0, 1, 2])
    receive_number(connection)  # its process id
    status = receive_number(connection)
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)
