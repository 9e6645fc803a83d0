"""What a person sees of a run: bars in a terminal, plain lines elsewhere, nothing of Ray's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0  # between two lines of the same stage where there is no terminal
Update = Callable[[int, int], None]  # done, total


def ignore(done: int, total: int) -> None:
    """An Update for callers that show nothing."""


class Reporter:
    """Shows stages (with a bar each) and finished lines; from several threads."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._lock = threading.Lock()
        self._bars: Progress | None = (
            None  # those of all stages in progress: a terminal shows one set at a time
        )
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
