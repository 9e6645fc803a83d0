"""Show the progress of a command: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0  # between two lines of the same stage, where there is no terminal
Update = Callable[[int, int], None]  # done, total


def ignore(done: int, total: int) -> None:
    """Do nothing: an Update for callers that show no progress."""


class Reporter:
    """Shows stages, each with a progress bar, and finished lines. Safe to use from many threads."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._lock = threading.Lock()
        # holds the bars of all open stages: a terminal shows one Progress at a time
        self._bars: Progress | None = None
        self._num_stages = 0

    def line(self, text: str) -> None:
        """Print a line that stays on the terminal."""
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """Show a stage of work: yields `update(done, total)`, and removes the bar at the end."""
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
            self._num_stages += 1
            if self._bars is None:
                columns = (
                    TextColumn("  {task.description}"),
                    BarColumn(30),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                )
                self._bars = Progress(*columns, console=self.console, transient=True)
                self._bars.start()
            return self._bars

    def _close_bars(self) -> None:
        with self._lock:
            self._num_stages -= 1
            if self._bars is not None and self._num_stages == 0:
                self._bars.stop()
                self._bars = None

    def _line_updates(self, title: str) -> Update:
        printed_at = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal printed_at
            if time.monotonic() - printed_at >= LINE_EVERY_S:
                printed_at = time.monotonic()
                self.line(f"  {title}: {done} of {total}")

        return update
