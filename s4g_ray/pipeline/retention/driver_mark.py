"""Mark a run folder while a driver works on it, so that other commands leave it alone.

The mark is a file, driver.json, with the process and the time. The driver writes it anew every
BEAT_S and removes it at its end. One that is killed leaves it; it then counts for STALE_S, but not
on the same machine, where its process can be seen to be gone.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

from s4g_ray.distributed.processes import is_alive
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files

NAME = "driver.json"
BEAT_S = 20.0
STALE_S = 120.0  # several beats: clocks of machines differ by seconds


class DriverMark:
    """Keeps driver.json in a run folder; a context manager."""

    def __init__(self, uri: str) -> None:
        self._uri = files.join(uri, NAME)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="driver-mark", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        files.remove(self._uri)

    def _write(self) -> None:
        value = {"machine": _name_machine(), "pid": os.getpid(), "time": time.time()}
        files.write_json(self._uri, value)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._write()
            except (RunError, OSError):  # the next beat tries again
                continue


def check_idle(uri: str, what: str) -> None:
    """Raise InputError when a driver works on a run folder. what: that must wait for its end."""
    mark = files.join(uri, NAME)
    try:
        value: dict[str, Any] = files.read_json(mark)
    except FileNotFoundError:
        return
    age_s = time.time() - value["time"]
    if age_s > STALE_S:
        return
    if value["machine"] == _name_machine() and not is_alive(value["pid"]):
        return
    raise InputError(
        f"{uri}: the run is in progress (process {value['pid']} on {value['machine']}, seen"
        f" {age_s:.0f} s ago); {what} once it has ended, or {STALE_S:.0f} s after it was killed"
    )


def _name_machine() -> str:
    """Return the host's name and the namespace of its process ids, which containers have anew."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()
