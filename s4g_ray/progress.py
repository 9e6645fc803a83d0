"""What a person sees of a run: bars in a terminal, plain lines elsewhere, nothing of Ray's own."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0  # between two lines of the same stage where there is no terminal

RAYLET_LINE = re.compile(r"(\x1b\[\d+m)?\(raylet\b")  # what its driver prints of processes that died
RAY_LOG_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] \S+\.cc:\d+: ")  # of its native core
Update = Callable[[int, int], None]  # done, total


def ignore(done: int, total: int) -> None:
    """An Update for callers that show nothing."""


class Reporter:
    """Shows stages (with a bar each) and finished lines; from several threads."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._lock = threading.Lock()
        self._bars: Progress | None = None  # those of all stages in progress: a terminal shows one set at a time
        self._stages = 0

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """A stage of work: yields `update(done, total)`. The bar goes away with it."""
        if not self.console.is_terminal:
            yield self._line_updates(title)
            return
        bars = self._open_bars()
        task = bars.add_task(title, total=None)
        try:
            yield lambda done, total: bars.update(task, completed=done, total=total)
        finally:
            bars.remove_task(task)
            self._close_bars()

    def _open_bars(self) -> Progress:
        with self._lock:
            self._stages += 1
            if self._bars is None:
                columns = TextColumn("  {task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
                self._bars = Progress(*columns, console=self.console, transient=True)
                self._bars.start()
            return self._bars

    def _close_bars(self) -> None:
        with self._lock:
            self._stages -= 1
            if self._bars is not None and not self._stages:
                self._bars.stop()
                self._bars = None

    def _line_updates(self, title: str) -> Update:
        last = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_EVERY_S:
                last = time.monotonic()
                self.line(f"  {title}: {done} of {total}")

        return update


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
