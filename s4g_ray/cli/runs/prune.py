"""Define `s4g prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from s4g_ray.cli.console import Steal, interruptible, make_reporter, print_json


def prune(
    run: Annotated[str, typer.Argument(help="The folder of a run that is not in progress.")],
    keep: Annotated[
        int | None,
        typer.Option(
            min=0, help="How many more stay of each kind than needed.  [default: as configured]"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed; remove nothing.")
    ] = False,
    steal: Steal = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Remove the tables, graphs, plans and indexes that a run does not need any more.

    It can be resumed, branched, reported, evaluated and exported as before. Checkpoints stay.
    """
    from s4g_ray.pipeline.retention.prune import as_record, describe_pruned, prune_run

    reporter = make_reporter(as_json)
    with interruptible("interrupted; run the same command again"):
        pruned = prune_run(run, keep=keep, dry_run=dry_run, steal=steal, reporter=reporter)
    for line in describe_pruned(pruned, dry_run=dry_run):
        reporter.line(line)
    print_json(as_json, as_record(pruned))
