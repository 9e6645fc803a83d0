"""Report progress, print JSON, and end a command with a message and an exit code."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4g_ray.distributed.submitted_job import in_job
from s4g_ray.errors import InputError, RunError

if TYPE_CHECKING:
    from rich.console import Console

UNLIMITED = 100_000  # columns
Steal = Annotated[
    bool,
    typer.Option("--steal", help="Take the folder over from a process that is still writing it."),
]


def make_reporter(as_json: bool) -> Any:
    """Make a Reporter for standard output, or for standard error when JSON is printed.

    Its tables are as wide as the terminal, or in a file or pipe as they need.
    """
    from s4g_ray.progress import Reporter, make_console

    # a job's log is not a terminal, even when FORCE_COLOR is set; None: find out
    is_terminal = False if in_job() else None
    console = make_console(stderr=as_json, force_terminal=is_terminal)
    widen(console)
    return Reporter(console)


def widen(console: Console) -> None:
    """Let lines that go to a file or another program be as long as they are, unless COLUMNS is set.

    Where there is no terminal, rich takes it to have 80 columns.
    """
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNLIMITED


def print_json(wanted: bool, value: Any) -> None:
    """Print a result as JSON, if it is wanted."""
    if wanted:
        typer.echo(json.dumps(value))


def parse_numbers(option: str, text: str | None, example: str) -> list[float]:
    """Read the numbers of an option, joined by commas; none without one. Raises InputError."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        message = f"{option} {text} is not a list of numbers such as {example}"
        raise InputError(message) from error


@contextmanager
def interruptible(message: str = "interrupted") -> Iterator[None]:
    """End with a message on Ctrl-C (exit code 130) or SIGTERM (143).

    Without this, typer and Ray end the command without a message.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail(message, 130)
    except SystemExit as end:
        if end.code != signal.SIGTERM:  # the exit code with which Ray ends a connected driver
            raise
        fail(message, 128 + signal.SIGTERM)


def owned(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that owns the folder of its argument `target`, with the option --steal."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*, steal: bool, **values: Any) -> None:
        from s4g_ray.storage.files import absolute  # imports fsspec: too slow for `s4g --help`
        from s4g_ray.storage.ownership.lease import owning

        reporter = make_reporter(values["as_json"])
        with interruptible(), owning(absolute(values["target"]), reporter, steal=steal):
            command(**values)

    option = inspect.Parameter(
        "steal", inspect.Parameter.KEYWORD_ONLY, annotation=Steal, default=False
    )
    parameters = [*signature.parameters.values(), option]
    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return run


def fail(message: str, code: int) -> None:
    """End the command with a message and an exit code."""
    for line in message.splitlines():
        typer.echo(f"s4g: {line}", err=True)
    sys.exit(code)


def run_app(app: Callable[[], None]) -> None:
    """Run commands; show one message instead of a traceback for errors that a user can fix."""
    try:
        app()
    except InputError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except ImportError as error:
        if "faiss" not in str(error):
            raise
        fail(str(error), 1)


def run_command(command: Callable[..., None]) -> None:
    """Run a script that is one command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    run_app(app)
