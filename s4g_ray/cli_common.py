"""What the commands share: where lines go, JSON, and how a command ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


def make_reporter(as_json: bool) -> Any:
    """Progress on the terminal; on standard error when standard output is for JSON."""
    from rich.console import Console

    from s4g_ray.progress import Reporter

    return Reporter(Console(stderr=as_json, highlight=False, soft_wrap=True))


def print_json(wanted: bool, value: Any) -> None:
    """Print a result for machines, where it is wanted."""
    if wanted:
        typer.echo(json.dumps(value))


@contextmanager
def interruptible(message: str = "interrupted") -> Iterator[None]:
    """End with a word and exit code 130 on Ctrl-C, where typer would end without one."""
    try:
        yield
    except KeyboardInterrupt:
        fail(message, 130)


def fail(message: str, code: int) -> None:
    """End the command with a message and an exit code."""
    for line in message.splitlines():
        typer.echo(f"s4g: {line}", err=True)
    sys.exit(code)
