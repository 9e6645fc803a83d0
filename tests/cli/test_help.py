"""Every command's help has an example that the command line accepts; --json is where it must be."""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.table import Table

from s4g_ray.cli.app import app
from s4g_ray.cli.console import make_reporter, print_json
from s4g_ray.cli.examples import EXAMPLES

WITH_JSON = ("check", "report", "evaluate", "mine", "doctor", "watch", "configs", "gallery")
NOT_JSON = {"serve"}  # runs until it is stopped


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the command of each that is no group."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, child in command.commands.items():
        yield from walk(child, (*words, name))


COMMANDS = dict(walk(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_help_of_a_command_has_an_example_that_it_accepts(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    assert command.epilog, f"give `s4g {' '.join(words)}` an example in cli/examples.py"
    label, _, example = command.epilog.partition(":")
    assert label == "Example"
    program, *arguments = shlex.split(example)
    assert program == "s4g"
    assert tuple(arguments[: len(words)]) == words
    command.make_context(words[-1], arguments[len(words) :])  # raises for what it does not take
    shown = command.get_help(command.make_context("s4g", [], resilient_parsing=True))
    assert "".join(example.split()) in "".join(shown.split())


def test_every_example_belongs_to_a_command() -> None:
    assert EXAMPLES.keys() == {" ".join(words) for words in COMMANDS}


def test_what_programs_read_has_json() -> None:
    for words, command in COMMANDS.items():
        names = {name for parameter in command.params for name in parameter.opts}
        if words[0] in WITH_JSON or words[0] not in NOT_JSON:
            assert "--json" in names, words


def test_numbers_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(True, {"a": [math.nan, 1.5, (math.inf, "b")], "c": {"d": -math.inf, "e": None}})
    assert json.loads(capsys.readouterr().out) == {
        "a": [None, 1.5, [None, "b"]],
        "c": {"d": None, "e": None},
    }
    print_json(False, 1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("columns", "num_lines"), [(None, 1), ("40", 6)])
def test_a_table_in_a_pipe_is_as_wide_as_it_needs_unless_columns_are_set(
    columns: str | None, num_lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    text = io.StringIO()
    monkeypatch.setattr("sys.stdout", text)
    table = Table("", show_header=False, box=None)
    table.add_row(" ".join(["palaeontology"] * 14))
    make_reporter(as_json=False).console.print(table)
    lines = text.getvalue().splitlines()
    assert len(lines) >= num_lines
    assert (len(lines) == 1) is (columns is None)
