"""Define `s4g configs`: the configurations that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from s4g_ray.cli.console import make_reporter, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from s4g_ray.config.shipped import ShippedConfig


def configs(
    name: Annotated[
        str | None, typer.Argument(help="One of them, such as earth.  [default: list all]")
    ] = None,
    target: Annotated[
        str | None,
        typer.Argument(help="Copy it to this new file, or into this folder.  [default: print it]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """List the configurations that come with the package, print one, or copy it.

    A copy is what you change for your own data.
    """
    from s4g_ray.config.shipped import copy_config, find_config, list_configs

    reporter = make_reporter(as_json)
    if name is None:
        found = list_configs()
        if not as_json:
            reporter.console.print(_list(found))
        listed = [
            {"name": one.name, "path": str(one.path), "summary": one.summary} for one in found
        ]
        print_json(as_json, {"configs": listed})
        return
    config = find_config(name)
    made = config.as_dict()
    if target is None:
        made["text"] = config.path.read_text()
        if not as_json:
            typer.echo(made["text"], nl=False)
    else:
        made["path"] = str(copy_config(name, target))
        reporter.line(f"{made['path']}: set data.uri and run_dir, then s4g train {made['path']}")
    print_json(as_json, made)


def _list(found: Sequence[ShippedConfig]) -> Table:
    """Make a table of names and summaries."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", box=None, show_header=False, pad_edge=False)
    for config in found:
        table.add_row(Text(config.name), Text(config.summary))
    return table
