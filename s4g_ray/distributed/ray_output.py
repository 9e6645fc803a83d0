"""Keep Ray's own log lines off the terminal."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO, cast

# a line that Ray's driver prints about processes that died
RAYLET_LINE = re.compile(r"(\x1b\[\d+m)?\(raylet\b")
# a line of Ray's native core
RAY_LOG_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] \S+\.cc:\d+: ")


class _WithoutRaylet:
    """A standard output that drops the lines that Ray's driver prints."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropping: set[int] = set()  # threads that have not ended their dropped line yet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it. `print` writes a line and then its end: both are dropped."""
        thread = threading.get_ident()
        if RAYLET_LINE.match(text):
            if not text.endswith("\n"):
                self._dropping.add(thread)
            return len(text)
        if thread in self._dropping:
            self._dropping.discard(thread)
            return len(text)
        return self._stream.write(text)


@contextmanager
def without_ray_lines() -> Iterator[None]:
    """Keep Ray's own lines off the terminal within the block; its log files hold them all.

    The driver prints some of them in Python. The native core writes others to file descriptor 2,
    below Python: a thread passes on the lines that are not Ray's.
    """
    stdout = cast(TextIO, _WithoutRaylet(sys.stdout))
    with redirect_stdout(stdout), _without_native_lines():
        yield


@contextmanager
def _without_native_lines() -> Iterator[None]:
    terminal = os.dup(2)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)

    def pass_on() -> None:
        with open(read_end, "rb") as lines:  # noqa: PTH123 (a descriptor)
            for line in lines:
                if not RAY_LOG_LINE.match(line):
                    os.write(terminal, line)

    thread = threading.Thread(target=pass_on, name="stderr-filter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(terminal, 2)  # closes the pipe, unless one of Ray's processes still holds it
        thread.join(timeout=2.0)
