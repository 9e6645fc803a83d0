"""Messages of converters, checks and galleries name options as they are typed: --lat-column."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import typer.main

from s4g_ray.cli.app import app
from tests.support.package_rules import read_sources

ROOT = Path(__file__).parents[2]
# near= and bounds= are typed in requests to a service; near's other forms come from Python alone
TYPED_ELSEWHERE = (
    "s4g_ray/gallery/search/map_view.py: bounds=",
    "s4g_ray/gallery/search/options.py: near=",
)
COMMANDS = ("convert", "check", "pack", "gallery", "locate")


def list_options() -> set[str]:
    """The names in Python of the options of COMMANDS: lat_column, pixels ..."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {"num_threads"}
    for name in COMMANDS:
        for command in getattr(commands[name], "commands", {name: commands[name]}).values():
            for parameter in command.params:
                found |= {parameter.name} & {
                    option.removeprefix("--").replace("-", "_") for option in parameter.opts
                }
    return found


def list_messages(tree: ast.Module) -> list[str]:
    """The texts of errors that are raised, in parts between values."""
    return [
        part.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        for part in ast.walk(node.exc)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def test_errors_name_options_as_they_are_typed() -> None:
    options = list_options()
    assert {"lat_column", "max_distance_m", "pixels", "outside_share", "top"} <= options
    compound = "|".join(sorted(name for name in options if "_" in name))
    assigned = "|".join(sorted(options))
    wrong = re.compile(rf"(?<![\w.\-])(?:(?:{compound})\b|(?:{assigned})=|_column\b)")
    found = [
        f"{source.path}: {message}"
        for source in read_sources(ROOT, "s4g_ray/datasets", "s4g_ray/gallery")
        for message in list_messages(source.tree)
        if wrong.search(message)
    ]
    assert set(found) == set(TYPED_ELSEWHERE)
