"""What the commands share: where lines go, JSON, and how a command ends."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from s4g_ray.distributed.submitted_job import in_job
from s4g_ray.errors import InputError, RunError


def make_reporter(as_json: bool) -> Any:
    """Progress on the terminal; on standard error when standard output is for JSON."""
    from rich.console import Console

    from s4g_ray.progress import Reporter

    plain = False if in_job() else None  # whatever FORCE_COLOR says: a job's log is no terminal
    return Reporter(Console(stderr=as_json, highlight=False, soft_wrap=True, force_terminal=plain))


def print_json(wanted: bool, value: Any) -> None:
    """Print a result for machines, where it is wanted."""
    if wanted:
        typer.echo(json.dumps(value))


@contextmanager
def interruptible(message: str = "interrupted") -> Iterator[None]:
    """End with a word, and exit code 130 on Ctrl-C or 143 on SIGTERM, where typer or Ray would end without one."""
    try:
        yield
    except KeyboardInterrupt:
        fail(message, 130)
    except SystemExit as end:
        if end.code != signal.SIGTERM:  # Ray's way to end a driver, once it is connected
            raise
        fail(message, 128 + signal.SIGTERM)


def fail(message: str, code: int) -> None:
    """End the command with a message and an exit code."""
    for line in message.splitlines():
        typer.echo(f"s4g: {line}", err=True)
    sys.exit(code)


def run_app(app: Callable[[], None]) -> None:
    """Run commands; one clear message instead of a traceback for what a user can act on."""
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
