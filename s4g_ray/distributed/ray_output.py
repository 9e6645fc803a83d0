"""Keep Ray's own log lines off the terminal."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

# a line of Ray's native core
RAY_LOG_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] \S+\.cc:\d+: ")


@contextmanager
def without_ray_lines() -> Iterator[None]:
    """Keep Ray's own lines off the terminal within the block; its log files hold them all.

    The driver prints what raylets and the autoscaler report: Ray's switch for that is turned off.
    Its native core writes to file descriptor 2, below Python: a thread passes on the lines that
    are not Ray's.
    """
    module: Any = ray._private.worker
    were_shown = module._worker_logs_enabled
    module._worker_logs_enabled = False
    try:
        with _without_native_lines():
            yield
    finally:
        module._worker_logs_enabled = were_shown


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
