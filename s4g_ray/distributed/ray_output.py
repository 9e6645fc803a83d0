"""Keep Ray's own log lines off the terminal."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO, cast

RAYLET_LINE = re.compile(
    r"(\x1b\[\d+m)?\(raylet\b"
)  # what its driver prints of processes that died
RAY_LOG_LINE = re.compile(
    rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] \S+\.cc:\d+: "
)  # of its native core


class _WithoutRaylet:
    """Standard output without the lines that Ray's driver prints by itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropping: set[int] = set()  # threads whose line is not ended yet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream's; `print` writes a line and its end one after the other."""
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
    """Keep Ray's own lines off the terminal: they stand in its session's log files, and we say what matters.

    Those of its native core are written to file descriptor 2 below Python, so a thread passes on what is no such
    line; its driver prints others.
    """
    with redirect_stdout(cast(TextIO, _WithoutRaylet(sys.stdout))), _without_native_lines():
        yield


@contextmanager
def _without_native_lines() -> Iterator[None]:
    shown = os.dup(2)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)

    def pass_on() -> None:
        with open(read_end, "rb") as lines:  # noqa: PTH123 (a descriptor)
            for line in lines:
                if not RAY_LOG_LINE.match(line):
                    os.write(shown, line)

    thread = threading.Thread(target=pass_on, name="stderr-filter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(shown, 2)  # the pipe ends here, unless a process of Ray's still holds it
        thread.join(timeout=2.0)
