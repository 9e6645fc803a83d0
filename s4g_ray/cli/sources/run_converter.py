"""Run a converter from the command line: its progress, its notes and its result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from s4g_ray.amounts import count_noun
from s4g_ray.cli.console import interruptible, make_reporter, print_json
from s4g_ray.distributed.submitted_job import check_kept

FolderOf = Annotated[
    str, typer.Argument(help="The folder of the data set as published, or s3://...")
]
Target = Annotated[str, typer.Argument(help="Where to write the data set: a folder or s3://...")]
Strict = Annotated[bool, typer.Option("--strict", help="Treat missing images as an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def run_converter(
    convert: Callable[..., Any],
    source: str,
    target: str,
    as_json: bool,
    *,
    stage: str | None = None,
    **options: Any,
) -> None:
    """Run a converter; report what it leaves out, then what it made.

    stage: the title of its progress, for a converter that takes `on_progress`.
    """
    check_kept("TARGET", target)
    reporter = make_reporter(as_json)
    notes: list[str] = []

    def report(line: str) -> None:
        notes.append(line)
        reporter.line(line)

    with interruptible(), ExitStack() as stack:
        if stage is not None:
            options["on_progress"] = stack.enter_context(reporter.stage(stage))
        dataset = convert(source, target, report=report, **options)
    finish(dataset, notes, reporter, as_json)


def finish(dataset: Any, notes: list[str], reporter: Any, as_json: bool) -> None:
    """Print the last line of every command, and the JSON."""
    from s4g_ray.storage.files import join, read_json

    counts = read_json(join(dataset.uri, "dataset.json"))["counts"]
    reporter.line(summarize(dataset.name, dataset.uri, counts))
    made = {"uri": dataset.uri, "name": dataset.name, "fingerprint": dataset.fingerprint}
    print_json(as_json, {**made, "counts": counts, "notes": notes})


def summarize(name: str, uri: str, counts: dict[str, dict[str, int]]) -> str:
    """Describe a data set in one line: queries by split, and references."""
    by_split = [
        f"{counts['queries'][split]:,} {split}"
        for split in ("train", "val", "test")
        if split in counts["queries"]
    ]
    queries = ", ".join(by_split)
    if len(by_split) > 1:
        queries = f"{', '.join(by_split[:-1])} and {by_split[-1]}"
    noun = "query" if sum(counts["queries"].values()) == 1 else "queries"
    references = count_noun(sum(counts["references"].values()), "reference")
    num_distractors = counts["references"].get("gallery", 0)
    if num_distractors:
        references += f" ({num_distractors:,} of them gallery only)"
    return f"{name}: {queries} {noun}, {references} in {uri}"
