"""Ask for processes of this machine."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def is_alive(pid: int, started: str = "") -> bool:
    """Return whether a process of this machine, and of this namespace of ids, is there.

    started: its start_of; another process that has the same id by now is not the one. A process
    that has ended, and that its parent has not asked for, is not alive.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    state, start = _read_stat(pid)
    return state not in ("Z", "X") and (not started or start in ("", started))


def start_of(pid: int) -> str:
    """Return when a process started, in ticks since this machine's start; empty if not known."""
    return _read_stat(pid)[1]


def name_machine() -> str:
    """Return a name for this machine since its start, and for its namespace of process ids.

    Containers have namespaces of their own, and may have the host's name.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):  # no Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _read_stat(pid: int) -> tuple[str, str]:
    """Return the state of a process and when it started; both empty where there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces
    return fields[0], fields[19]
