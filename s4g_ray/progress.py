"""What a person sees of a run: bars in a terminal, plain lines elsewhere, nothing of Ray's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0  # between two lines of the same stage where there is no terminal

Update = Callable[[int, int], None]  # done, total


def ignore(done: int, total: int) -> None:  # noqa: ARG001
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
        columns = (
            TextColumn("  {task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=None, note="")
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def _line_updates(self, title: str) -> Update:
        last = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_EVERY_S:
                last = time.monotonic()
                self.line(f"  {title}: {done} of {total}")

        return update
