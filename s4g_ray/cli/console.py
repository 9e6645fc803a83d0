"""Report progress, print JSON, and end a command with a message and an exit code."""

from __future__ import annotations

import functools
import inspect
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4g_ray.distributed.submitted_job import in_job
from s4g_ray.errors import InputError, RunError

if TYPE_CHECKING:
    from rich.console import Console

UNLIMITED = 100_000  # columns
CTRL_C = 130  # exit code
INTERRUPTED = "interrupted"
PASSED_ON_S = 0.5
DRAWN_S = 0.1  # in which a display that is being drawn is complete
ANSWER_S = 0.5  # for a store to tell whether there is something to resume
SHOW_CURSOR = b"\x1b[?25h"  # a display may have hidden it
Message = str | Callable[[], str]
Steal = Annotated[
    bool,
    typer.Option("--steal", help="Take the folder over from a process that is still writing it."),
]


def can_draw(console: Console) -> bool:
    """Return whether a display can be drawn: not into a file, nor in a terminal without a cursor.

    FORCE_COLOR makes a terminal of any file, so the file is asked itself.
    """
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


def make_reporter(as_json: bool) -> Any:
    """Make a Reporter for standard output, or for standard error when JSON is printed.

    Its tables are as wide as the terminal, or in a file or pipe as they need.
    """
    from s4g_ray.progress import Reporter, make_console

    # a job's log is not a terminal, even when FORCE_COLOR is set; None: find out
    is_terminal = False if in_job() else None
    console = make_console(stderr=as_json, force_terminal=is_terminal)
    widen(console)
    if can_draw(console):
        _interrupts.displays.append(console)
    return Reporter(console)


def widen(console: Console) -> None:
    """Let lines that go to a file or another program be as long as they are, unless COLUMNS is set.

    Where there is no terminal, rich takes it to have 80 columns.
    """
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNLIMITED


def print_json(wanted: bool, value: Any) -> None:
    """Print a result as JSON, if it is wanted; numbers that are not finite as null."""
    if wanted:
        typer.echo(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    """Return plain values with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def parse_numbers(option: str, text: str | None, example: str) -> list[float]:
    """Read the numbers of an option, joined by commas; none without one. Raises InputError."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        message = f"{option} {text} is not a list of numbers such as {example}"
        raise InputError(message) from error


@contextmanager
def interruptible(message: Message = INTERRUPTED) -> Iterator[None]:
    """End with a message on Ctrl-C (exit code 130) or SIGTERM (143).

    A function returns the message when it is needed. Without this, typer and Ray end the command
    without one.
    """
    outer = _interrupts.message
    _interrupts.message = message
    try:
        yield
    except KeyboardInterrupt:
        leases = sys.modules.get("s4g_ray.storage.ownership.lease")
        if leases is not None:
            leases.raise_if_lost()  # Ctrl-C is not why
        fail(evaluate(message), CTRL_C)
    except SystemExit as end:
        if end.code != signal.SIGTERM:  # the exit code with which Ray ends a connected driver
            raise
        fail(evaluate(message), 128 + signal.SIGTERM)
    finally:
        _interrupts.message = outer


def evaluate(message: Message) -> str:
    """Return a message of interruptible."""
    return message if isinstance(message, str) else message()


def if_begun(folder: str, message: str) -> Callable[[], str]:
    """Return a function of interruptible: the message only where a command has written a folder."""

    def choose() -> str:
        from s4g_ray.storage import files  # imports fsspec: too slow for `s4g --help`

        try:
            written = set(files.list_names(files.absolute(folder))) - {files.LEASE}
        except (InputError, RunError, OSError):
            return INTERRUPTED
        return message if written else INTERRUPTED

    return choose


class _Interrupts:
    """Handles SIGINT: the first one lets the command end in order, a second one ends it at once.

    message: what the command tells when it is interrupted. displays: consoles that may hold one.
    """

    def __init__(self) -> None:
        self.count = 0
        self.message: Message = INTERRUPTED
        self.displays: list[Console] = []

    def __call__(self, *_: object) -> None:
        self.count += 1
        if self.count == 1:
            raise KeyboardInterrupt
        try:
            for display in self.displays:
                display.quiet = True  # it would be drawn over the line
            if self.count == 2:
                self._tell()
            self._write_to_display(SHOW_CURSOR)
        finally:
            os._exit(CTRL_C)

    def has_told(self) -> None:
        """Let further signals end the process without another line."""
        self.count = 2

    def _tell(self) -> None:
        time.sleep(DRAWN_S)
        self._write_to_display(b"\r\n")
        message = self._evaluate_in_time()
        remedy = message.removeprefix(INTERRUPTED) if message.startswith(INTERRUPTED) else ""
        os.write(2, f"s4g: interrupted twice: ended at once{remedy}\n".encode())
        time.sleep(PASSED_ON_S)  # a thread may pass it on to the terminal

    def _evaluate_in_time(self) -> str:
        """Return the message, or that without a remedy where a store does not answer."""
        found = [INTERRUPTED]
        asking = threading.Thread(target=lambda: found.append(evaluate(self.message)), daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return found[-1]

    def _write_to_display(self, data: bytes) -> None:
        for display in self.displays:
            os.write(2 if display.stderr else 1, data)


_interrupts = _Interrupts()


def owned(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that owns the folder of its argument `target`, with the option --steal."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*, steal: bool, **values: Any) -> None:
        from s4g_ray.storage.files import absolute  # imports fsspec: too slow for `s4g --help`
        from s4g_ray.storage.ownership.lease import owning

        reporter = make_reporter(values["as_json"])
        target = absolute(values["target"])
        with interruptible(), owning(target, reporter, steal=steal, interrupts=True):
            command(**values)

    option = inspect.Parameter(
        "steal", inspect.Parameter.KEYWORD_ONLY, annotation=Steal, default=False
    )
    parameters = [*signature.parameters.values(), option]
    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return run


class _Ended(SystemExit):
    """The command has ended with a message."""


def fail(message: str, code: int) -> None:
    """End the command with a message and an exit code."""
    if code == CTRL_C:
        _interrupts.has_told()
    for line in message.splitlines():
        typer.echo(f"s4g: {line}", err=True)
    raise _Ended(code)


def run_app(app: Callable[[], None]) -> None:
    """Run commands; show one message instead of a traceback for errors that a user can fix.

    Texts that the terminal's encoding does not have are escaped: a result is not lost to them.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, _interrupts)
    try:
        app()
    except SystemExit as end:  # typer ends a command so where nothing handles Ctrl-C
        if end.code != CTRL_C or isinstance(end, _Ended):
            raise
        fail(INTERRUPTED, CTRL_C)
    except KeyboardInterrupt:
        fail(INTERRUPTED, CTRL_C)
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
