"""Define `s4g doctor`: what this machine has, and what keeps the commands from working."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from s4g_ray.cli.console import interruptible, make_reporter, print_json

if TYPE_CHECKING:
    from s4g_ray.cli.setup.finding import Finding


def doctor(
    uris: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URI]...", help="Folders or s3://... to reach, of data or runs."),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Start Ray, or connect to the cluster of RAY_ADDRESS; 10 s."),
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write a small file to each URI, and remove it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check this machine: libraries, cores, memory, GPUs, FAISS, Ray, folders and stores.

    Each line is ok, a warning or an error, and says what to do. Exit code 1 for an error.
    """
    from s4g_ray.cli.setup.finding import findings_table, summarize

    reporter = make_reporter(as_json)
    with interruptible(), reporter.stage("looking at this machine"):
        found = list(examine(uris or [], ray=ray, write=write))
    if not as_json:
        reporter.console.print(findings_table(found))
    summary = summarize(found)
    print_json(as_json, summary)
    if not summary["ok"]:
        raise typer.Exit(1)


def examine(uris: list[str], *, ray: bool, write: bool) -> Iterator[Finding]:
    """Yield what is found, in the order of the table. ray: start or reach Ray."""
    from s4g_ray.cli.setup import access, libraries, machine

    yield from libraries.check_libraries()
    gpus = machine.list_gpus()
    yield libraries.check_faiss(has_gpu=bool(gpus))
    yield machine.check_cores()
    yield machine.check_memory()
    yield machine.check_gpus(gpus)
    yield machine.check_shared_memory()
    yield machine.check_temporary_folder()
    yield machine.check_home()
    address = os.environ.get("RAY_ADDRESS")
    reached = access.check_address(address)
    yield reached
    yield access.check_token()
    if ray and reached.state == "ok":
        yield access.check_ray(address)
    for uri in uris:
        yield access.check_store(uri, write=write)
