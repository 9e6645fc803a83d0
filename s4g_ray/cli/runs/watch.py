"""Define `s4g watch`: show a run that another process or machine trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from s4g_ray.cli.console import can_draw, interruptible, make_reporter, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from s4g_ray.cli.runs.watched_run import WatchedRun
    from s4g_ray.progress import Reporter

LOCAL_S = 2.0  # between two looks at a folder
STORE_S = 10.0  # at an object store
WAIT_S = 300.0  # for a run to begin
BORDER = 6  # lines of a terminal for all but the epochs


def watch(
    run: Annotated[str, typer.Argument(help="A run's folder, or s3://...")],
    once: Annotated[
        bool, typer.Option("--once", help="Print plain lines about the run as it is, and end.")
    ] = False,
    every_s: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds between two looks.  [default: 2, of s3:// 10]"),
    ] = None,
    wait_s: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds to wait for a run to begin.  [default: 300, with --once and --json 0]",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the state as JSON, and end.")
    ] = False,
) -> None:
    """Show a run from elsewhere, such as a job on a cluster, until it is finished or stopped.

    Reads the run's folder; changes nothing. In a terminal it shows one display, elsewhere a line
    for each epoch. A run that is stopped is named with the command that resumes it, and exit code
    1; with --once and --json the exit code is 0.
    """
    from s4g_ray.cli.runs.watched_run import WatchedRun, await_run
    from s4g_ray.storage import files
    from s4g_ray.storage.ownership.observer import LeaseObserver

    uri = files.absolute(run)
    reporter = make_reporter(as_json)
    observer = LeaseObserver(uri)
    pause_s = every_s or (LOCAL_S if files.is_local(uri) else STORE_S)
    is_single = once or as_json
    if wait_s is None:
        wait_s = 0.0 if is_single else WAIT_S
    with interruptible("stopped waiting"):
        await_run(uri, observer, reporter, wait_s=wait_s, pause_s=pause_s)
    with interruptible("stopped watching; the run is as it was"):
        if is_single:
            found = WatchedRun.read(uri, observer.look_until_sure())
            if not as_json:
                _print_once(reporter, found)
            print_json(as_json, found.as_dict())
            return
        show = _show_live if can_draw(reporter.console) else _print_lines
        found = show(reporter, lambda: WatchedRun.read(uri, observer.look()), pause_s)
    if found.is_stopped:
        raise typer.Exit(1)


def _print_once(reporter: Reporter, found: WatchedRun) -> None:
    from s4g_ray.cli.runs.run_view import describe_epochs, describe_state

    reporter.line(found.describe())
    for line in describe_epochs(found.state):
        reporter.line(line)
    for note in found.state.notes:
        reporter.line(f"  {note}")
    reporter.line(describe_state(found.state, time.time()))


def _print_lines(reporter: Reporter, look: Callable[[], WatchedRun], pause_s: float) -> WatchedRun:
    """Print a line for each epoch, when its record and that of its evaluation have come."""
    from s4g_ray.cli.runs.run_view import describe_epoch

    shown: dict[int, str] = {}
    num_notes = 0
    while True:
        found = look()
        for epoch, row in sorted(found.state.rows.items()):
            line = describe_epoch(row)
            if shown.get(epoch) != line:
                shown[epoch] = line
                reporter.line(line)
        for note in found.state.notes[num_notes:]:
            reporter.line(f"  {note}")
        num_notes = len(found.state.notes)
        if not found.is_running:
            reporter.line(found.describe())
            return found
        time.sleep(pause_s)


def _show_live(reporter: Reporter, look: Callable[[], WatchedRun], pause_s: float) -> WatchedRun:
    """Keep one display up to date until the run ends; leave a table of all epochs."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from s4g_ray.cli.runs.run_view import describe_state, list_notes, make_table

    console = reporter.console
    found = look()

    def render() -> RenderableType:
        most = max(3, console.height - BORDER)
        return Group(
            Text(found.describe()),
            *([make_table(found.state, most)] if found.state.rows else []),
            *list_notes(found.state),
            Text(describe_state(found.state, time.time())),
        )

    with Live(console=console, get_renderable=render, refresh_per_second=2, transient=True):
        while found.is_running:
            time.sleep(pause_s)
            found = look()
    if found.state.rows:
        console.print(make_table(found.state))
    reporter.line(found.describe())
    return found
