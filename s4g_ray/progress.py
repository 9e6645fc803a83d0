"""What a person sees of a run: bars in a terminal, plain lines elsewhere, nothing of Ray's own."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0  # between two lines of the same stage where there is no terminal

RAY_LOG_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] \S+\.cc:\d+: ")  # of its native core
Update = Callable[[int, int], None]  # done, total


def ignore(done: int, total: int) -> None:
    """An Update for callers that show nothing."""


class Reporter:
    """Shows stages (with a bar each) and finished lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """A stage of work: yields `update(done, total)`. The bar goes away with it."""
        if not self.console.is_terminal:
            yield self._line_updates(title)
            return
        columns = TextColumn("  {task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def _line_updates(self, title: str) -> Update:
        last = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_EVERY_S:
                last = time.monotonic()
                self.line(f"  {title}: {done} of {total}")

        return update


@contextmanager
def without_native_ray_logs() -> Iterator[None]:
    """Keep the log lines of Ray's native core off standard error: they stand in its session's log files.

    They are written to file descriptor 2 below Python, so a thread passes on what is not such a line.
    """
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
