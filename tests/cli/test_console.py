"""Ctrl-C at any time is one line and exit code 130; texts are never lost to the terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from s4g_ray.storage.ownership import lease
from s4g_ray.storage.ownership.lease import owning

# commands that say where they are, and wait there
COMMANDS = """
import sys, time
import typer
from pathlib import Path
from s4g_ray.storage.ownership import lease
from s4g_ray.cli.console import if_begun, interruptible, make_reporter, owned, run_app

lease.BEAT_S = 0.1
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

def pause():
    print("on", flush=True)
    time.sleep(120)

@app.command()
def bare():
    pause()

@app.command()
def covered():
    with interruptible("interrupted; what to do"):
        pause()

@app.command()
def slow_to_end():
    with interruptible("interrupted; what to do"):
        try:
            pause()
        finally:
            pause()

@app.command()
def ask_store():
    with interruptible(lambda: time.sleep(120)):
        try:
            pause()
        finally:
            pause()

@app.command()
def draw():
    from s4g_ray.cli.runs.live import LiveReporter
    from s4g_ray.cli.runs.run_state import RunState
    with (
        interruptible("interrupted; what to do"),
        LiveReporter(make_reporter(False).console, RunState("run", 5)),
    ):
        try:
            pause()
        finally:
            pause()

@app.command()
@owned
def write(target: str, begun: bool = False, as_json: bool = False):
    with interruptible(if_begun(target, "interrupted; resume")):
        if begun:
            Path(target, "part").touch()
        pause()

@app.command()
def show(text: str):
    print(bytes.fromhex(text).decode("utf-8", "surrogateescape"))

run_app(app)
"""
ENDED_AT_ONCE = "s4g: interrupted twice: ended at once"


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "commands.py"
    path.write_text(COMMANDS)
    return str(path)


def interrupt(script: str, *arguments: str, times: int = 1) -> tuple[int, list[str]]:
    """Press Ctrl-C each time the command waits; return its exit code and lines of errors."""
    command = [sys.executable, script, *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(times):
            assert process.stdout.readline() == "on\n"
            os.killpg(process.pid, signal.SIGINT)
        code = process.wait(120)
        return code, process.stderr.read().splitlines()


@pytest.mark.parametrize(
    ("command", "times", "told"),
    [
        ("bare", 1, "s4g: interrupted"),
        ("covered", 1, "s4g: interrupted; what to do"),
        ("slow-to-end", 2, f"{ENDED_AT_ONCE}; what to do"),
        ("ask-store", 2, ENDED_AT_ONCE),  # which does not answer
    ],
)
def test_ctrl_c_is_one_line(script: str, command: str, times: int, told: str) -> None:
    assert interrupt(script, command, times=times) == (130, [told])


def test_nothing_is_drawn_over_the_line_of_a_second_ctrl_c(script: str) -> None:
    terminal, side = pty.openpty()
    command = [sys.executable, script, "draw"]
    with subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, start_new_session=True
    ) as process:
        os.close(side)
        for _ in range(2):
            printed = b""
            while b"on\r\n" not in printed:
                printed += os.read(terminal, 10_000)
            os.killpg(process.pid, signal.SIGINT)
        printed = read_to_end(terminal)
        assert process.wait(120) == 130
    told = f"\r\n{ENDED_AT_ONCE}; what to do\r\n\x1b[?25h"
    assert printed.endswith(told.encode())


def read_to_end(terminal: int) -> bytes:
    """Read what is written to a terminal until its last program has ended."""
    printed = b""
    while True:
        try:
            printed += os.read(terminal, 10_000)
        except OSError:  # nothing has it open any more
            os.close(terminal)
            return printed


def test_resuming_is_named_only_where_something_was_begun(script: str, tmp_path: Path) -> None:
    target = tmp_path / "new"
    assert interrupt(script, "write", str(target)) == (130, ["s4g: interrupted"])
    assert not target.exists()
    found = interrupt(script, "write", str(target), "--begun")
    assert found == (130, ["s4g: interrupted; resume"])
    assert [path.name for path in target.iterdir()] == ["part"]


def test_a_command_whose_target_is_stolen_fails_with_one_line(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    target = tmp_path / "new"
    with subprocess.Popen(
        [sys.executable, script, "write", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "on\n"
        with owning(str(target), steal=True):
            assert process.wait(120) == 1
        (told,) = process.stderr.read().splitlines()
    assert told.startswith(f"s4g: {target} was taken over by process {os.getpid()} of")


@pytest.mark.parametrize("text", ["Å", "\udce9 of latin-1", "日本"])
def test_a_text_that_the_terminal_does_not_have_is_escaped(script: str, text: str) -> None:
    hexed = text.encode("utf-8", "surrogateescape").hex()
    done = subprocess.run(
        [sys.executable, script, "show", hexed],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == text.encode("ascii", "backslashreplace").decode()
