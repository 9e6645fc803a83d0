"""Define `s4g plan`: what a run will take, before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from s4g_ray.amounts import format_duration
from s4g_ray.cli.console import interruptible, make_reporter, print_json
from s4g_ray.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from s4g_ray.pipeline.budget.plan import RunPlan


def plan(
    config: Annotated[str, typer.Argument(help="A YAML file, such as configs/earth.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.epochs=3")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="Take speeds from this run's metrics.jsonl.  [default: measure here]"),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster to plan for.  [default: as configured]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Estimate the disk, memory, actors and hours of a run. Starts and writes nothing.

    Reads the data set, and measures for some seconds how fast this machine decodes and encodes.
    """
    keep_freed_memory()  # as workers and actors do, whose speed is measured here
    from s4g_ray.config.loading import load_config

    chosen = [*(overrides or []), *([] if address is None else [f"ray.address={address}"])]
    loaded = load_config(config, chosen)  # before the slow imports: errors come at once
    from s4g_ray.pipeline.budget.plan import plan_run

    reporter = make_reporter(as_json)
    with interruptible():
        found = plan_run(loaded, rates_run=rates, reporter=reporter)
    if not as_json:
        for table in list_tables(found):
            reporter.console.print(table)
        for line in describe_plan(found):
            reporter.line(line)
    print_json(as_json, found.as_record())


def list_tables(found: RunPlan) -> Iterator[Table]:
    """Yield the tables of a plan: disk, memory and stages."""
    from rich.table import Table

    from s4g_ray.amounts import format_bytes

    disk = Table("disk", "of one", "at once", "in all", box=None, title_justify="left")
    for stock in found.stocks:
        row = (format_bytes(stock.one), str(stock.count), format_bytes(stock.total))
        disk.add_row(stock.name, *row)
    total = format_bytes(sum(stock.total for stock in found.stocks))
    disk.add_row("at most", "", "", total, style="bold")
    yield disk
    memory = Table("\nmemory", "\neach", "\nprocesses", "\n", box=None)
    for process in found.memory:
        memory.add_row(
            process.name, format_bytes(1e9 * process.gb), str(process.count), process.note
        )
    yield memory
    stages = Table("\ntime", "\nof one", "\ntimes", "\nin all", "\nbound by", box=None)
    for stage in found.stages:
        beside = " (beside training)" if stage.beside else ""
        stages.add_row(
            stage.name + beside,
            _format_seconds(stage.seconds),
            str(stage.count),
            _format_seconds(stage.total),
            stage.binds,
        )
    stages.add_row("the run", "", "", _format_seconds(found.seconds), "", style="bold")
    yield stages


def describe_plan(found: RunPlan) -> Iterator[str]:
    """Yield lines about a plan: data set, cluster, what binds, what the figures rest on, faults."""
    from s4g_ray.amounts import count_noun

    sizes = found.sizes
    machines = found.machines
    yield ""
    yield (
        f"{count_noun(sizes.pairs, 'pair')} of {count_noun(sizes.places, 'place')},"
        f" {sizes.parameters:,} parameters, D={sizes.dim}"
    )
    yield (
        f"{count_noun(machines.num_nodes, 'node')} with {count_noun(machines.cpus, 'CPU')} and"
        f" {count_noun(machines.gpus, 'GPU')}: {machines.source}"
    )
    for name, index in found.indexes.items():
        yield f"index of {name}: {index.plan.reason}"
    longest = max(found.stages, key=lambda stage: stage.total or 0.0)
    if found.seconds:
        share = (longest.total or 0.0) / sum(stage.total or 0.0 for stage in found.stages)
        yield f"most of the work: {longest.name} ({share:.0%}), bound by {longest.binds}"
    else:
        yield (
            "some rates need a GPU, and there is none here: run `s4g plan` on a node that has one,"
            " or name an earlier run with --rates RUN"
        )
    yield (
        f"times follow from the speed of {found.rates.source}; that of indexes, geographic"
        " neighbors and scores was measured here"
    )
    yield from found.faults


def _format_seconds(seconds: float | None) -> str:
    return "not known" if seconds is None else format_duration(seconds)
