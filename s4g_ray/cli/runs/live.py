"""Show a run in a terminal: one display of its epochs and stages, below the lines printed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress
from rich.text import Text

from s4g_ray.cli.console import can_draw
from s4g_ray.cli.runs.run_state import RunState, read_state
from s4g_ray.cli.runs.run_view import describe_state, make_table
from s4g_ray.config.schema import RunConfig
from s4g_ray.pipeline.records import RunRecord
from s4g_ray.pipeline.run_start import check_start_early
from s4g_ray.progress import Reporter, make_bars
from s4g_ray.storage import s3_settings

REFRESH_PER_S = 4
BORDER = 8  # lines of a terminal for all but the epochs: state, heading, bars


class LiveReporter(Reporter):
    """A Reporter and a callback of a run that keep one display up to date; a context manager.

    Lines stay above the display, as in any terminal. At the end the display becomes a table of all
    epochs that stays. Start it before Ray's session, which then filters what is printed first.
    """

    def __init__(self, console: Console, state: RunState) -> None:
        super().__init__(console)
        self.state = state
        self._all_bars = make_bars(console)
        self._since = time.monotonic()
        self._has_begun = False  # a record of this session has come
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._has_begun and self.state.rows:
            self.console.print(make_table(self.state))

    def on_record(self, record: RunRecord) -> None:
        """Take a record of the run into the display."""
        self._has_begun = True
        self.state.add(record)

    def record_line(self, text: str) -> None:
        """Leave out a line about a record: the display shows it."""

    def open_bars(self) -> Progress:
        """Return the bars, which the display holds."""
        return self._all_bars

    def close_bars(self) -> None:
        """Leave the bars in the display."""

    def refresh(self) -> None:
        """Draw the display now."""
        self._live.refresh()

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._has_begun and self.state.rows:  # a run that is not resumed after all is not shown
            parts.append(make_table(self.state, max(3, self.console.height - BORDER)))
        if self._has_begun:
            parts.append(Text(describe_state(self.state, time.time())))
        if self._all_bars.tasks:
            parts.append(self._all_bars.get_renderable())
        elif not self._has_begun:
            minutes, seconds = divmod(int(time.monotonic() - self._since), 60)
            text = f"  waiting for libraries, the data set and Ray  {minutes}:{seconds:02d}"
            parts.append(Text(text, "yellow"))
        return Group(*parts)


@contextmanager
def follow_run(
    reporter: Reporter, config: RunConfig, *, resume: bool, from_epoch: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the arguments `reporter` and `callbacks` with which run() shows a run.

    In a terminal a display, elsewhere the plain lines of `reporter`. Raises InputError at once for
    a folder in which the run may not start.
    """
    s3_settings.apply(config.storage)  # before the run does: its folder is read here
    check_start_early(config.run_dir, resume=resume, from_epoch=from_epoch)
    if not can_draw(reporter.console):
        yield {"reporter": reporter}
        return
    with LiveReporter(reporter.console, read_state(config.run_dir, config.train.epochs)) as live:
        yield {"reporter": live, "callbacks": [live]}
