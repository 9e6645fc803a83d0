"""Define `s4g watch`: show a run that another process or machine trains."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4g_ray.cli.console import can_draw, interruptible, make_reporter, print_json
from s4g_ray.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from s4g_ray.cli.runs.run_state import RunState
    from s4g_ray.progress import Reporter

LOCAL_S = 2.0  # between two looks at a folder
STORE_S = 10.0  # at an object store
SILENT_S = 300.0  # without a record: the run may have ended
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the state as JSON, and end.")
    ] = False,
) -> None:
    """Show a run from elsewhere, such as a job on a cluster, until it is finished.

    Reads run.json, config.yaml and metrics.jsonl in the run's folder; changes nothing. In a
    terminal it shows one display, elsewhere a line for each epoch.
    """
    from s4g_ray.storage import files

    uri = files.absolute(run)
    reporter = make_reporter(as_json)
    with interruptible("stopped watching; the run goes on"):
        state, status = _read_run(uri)
        if as_json:
            print_json(True, {**state.as_dict(time.time()), "status": status})
        elif once:
            _print_once(reporter, state, status)
        else:
            pause_s = every_s or (LOCAL_S if files.is_local(uri) else STORE_S)
            if can_draw(reporter.console):
                _show_live(reporter, uri, pause_s)
            else:
                _print_lines(reporter, uri, pause_s)


def _read_run(uri: str) -> tuple[RunState, str]:
    """Return the state and the status of a run. Raises InputError where there is none."""
    from s4g_ray.cli.runs.run_state import read_state
    from s4g_ray.config.loading import load_config
    from s4g_ray.storage import files

    path = files.join(uri, "run.json")
    if not files.exists(path):
        raise InputError(f"{uri} holds no run (yet): run.json is written when a run begins")
    info: dict[str, Any] = files.read_json(path)
    config = load_config(files.join(uri, "config.yaml"))
    return read_state(uri, config.train.epochs), str(info.get("status"))


def _describe_status(state: RunState, status: str) -> str:
    """Describe when the run gave its last sign of life."""
    if status != "running":
        return f"{state.uri}: {status}"
    if state.changed is None:
        return f"{state.uri}: started, no record yet"
    from s4g_ray.amounts import format_duration

    silent_s = max(0.0, time.time() - state.changed)
    text = f"{state.uri}: running, last record {format_duration(silent_s)} ago"
    return f"{text}; it may have ended or wait" if silent_s > SILENT_S else text


def _print_once(reporter: Reporter, state: RunState, status: str) -> None:
    from s4g_ray.cli.runs.run_view import describe_epochs, describe_state

    reporter.line(_describe_status(state, status))
    for line in describe_epochs(state):
        reporter.line(line)
    for note in state.notes:
        reporter.line(f"  {note}")
    reporter.line(describe_state(state, time.time()))


def _print_lines(reporter: Reporter, uri: str, pause_s: float) -> None:
    """Print a line for each epoch, when its record and that of its evaluation have come."""
    from s4g_ray.cli.runs.run_view import describe_epoch

    shown: dict[int, str] = {}
    num_notes = 0
    while True:
        state, status = _read_run(uri)
        for epoch, row in sorted(state.rows.items()):
            line = describe_epoch(row)
            if shown.get(epoch) != line:
                shown[epoch] = line
                reporter.line(line)
        for note in state.notes[num_notes:]:
            reporter.line(f"  {note}")
        num_notes = len(state.notes)
        if status != "running":
            reporter.line(_describe_status(state, status))
            return
        time.sleep(pause_s)


def _show_live(reporter: Reporter, uri: str, pause_s: float) -> None:
    """Keep one display up to date until the run is finished; leave a table of all epochs."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from s4g_ray.cli.runs.run_view import describe_state, list_notes, make_table

    console = reporter.console
    state, status = _read_run(uri)

    def render() -> RenderableType:
        most = max(3, console.height - BORDER)
        return Group(
            Text(_describe_status(state, status)),
            make_table(state, most),
            *list_notes(state),
            Text(describe_state(state, time.time())),
        )

    with Live(console=console, get_renderable=render, refresh_per_second=2, transient=True):
        while status == "running":
            time.sleep(pause_s)
            state, status = _read_run(uri)
    reporter.line(_describe_status(state, status))
    console.print(make_table(state))
