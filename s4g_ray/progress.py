"""Show the progress of a command: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

LINE_EVERY_S = 10.0  # between two lines of the same stage, where there is no terminal
Update = Callable[[int, int], None]  # done, total
Report = Callable[[str], None]  # takes one line, such as what was left out


def ignore(done: int, total: int) -> None:
    """Do nothing: an Update for callers that show no progress."""


def ignore_report(line: str) -> None:
    """Do nothing: a Report for callers that show nothing."""


class _CountColumn(ProgressColumn):
    """Shows how much is done, or what is waited for while nothing is known yet."""

    def render(self, task: Task) -> Text:
        """Return the text of a task."""
        if task.total is None:
            waits_for = task.fields["waits_for"]
            return Text(f"waiting for {waits_for}" if waits_for else "", style="yellow")
        return Text(f"{task.completed:,.0f} of {task.total:,.0f}")


def make_bars(console: Console) -> Progress:
    """Return bars of stages that are removed at their end; they are not shown yet."""
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(30),
        _CountColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


class _Console(Console):
    """A console that fills no line of a table with blanks at its end in a file or pipe."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts and tables, as Console.print does."""
        if self.is_terminal or all(isinstance(one, str | Text) for one in objects):
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        lines = [line.rstrip() for line in captured.get().split("\n")]
        super().print("\n".join(lines), end="")


def make_console(*, stderr: bool = False, force_terminal: bool | None = None) -> Console:
    """Return a console that shows texts as they are.

    Names and paths of a user's may hold what rich reads as markup or as an emoji, also in tables.
    force_terminal: None finds out whether there is a terminal.
    """
    return _Console(
        stderr=stderr,
        force_terminal=force_terminal,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
    )


class Reporter:
    """Shows stages, each with a progress bar, and finished lines. Safe to use from many threads."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()
        self._lock = threading.Lock()
        # holds the bars of all open stages: a terminal shows one Progress at a time
        self._bars: Progress | None = None
        self._num_stages = 0
        self._silenced: WeakSet[threading.Thread] = WeakSet()

    def line(self, text: str) -> None:
        """Print a line that stays on the terminal."""
        if threading.current_thread() in self._silenced:
            return
        self.console.print(text, markup=False, emoji=False)

    def record_line(self, text: str) -> None:
        """Print a line about what a run records too; a display of the records leaves it out."""
        self.line(text)

    @contextmanager
    def silencing_left_threads(self) -> Iterator[None]:
        """Leave out lines of threads that start in the block and are still there at its end.

        A round may be in progress when a run is stopped: no line follows the command's last one.
        """
        before = set(threading.enumerate())
        try:
            yield
        finally:
            self._silenced.update(set(threading.enumerate()) - before)

    @contextmanager
    def stage(self, title: str, waits_for: str = "") -> Iterator[Update]:
        """Show a stage of work: yields `update(done, total)`, and removes the bar at the end.

        waits_for: what the stage waits for until its first update, such as `2 workers`.
        """
        if not self.console.is_terminal:
            yield self._line_updates(title)
            return
        bars = self.open_bars()
        task = bars.add_task(title, total=None, waits_for=waits_for)
        try:
            yield lambda done, total: bars.update(task, completed=done, total=total)
        finally:
            bars.remove_task(task)
            self.close_bars()

    def open_bars(self) -> Progress:
        """Return the bars of all stages, shown from the first stage on."""
        with self._lock:
            self._num_stages += 1
            if self._bars is None:
                self._bars = make_bars(self.console)
                self._bars.start()
            return self._bars

    def close_bars(self) -> None:
        """Hide the bars when the last stage has ended."""
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
