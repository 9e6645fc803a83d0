"""write_report: one self-contained page about a run, from its folder and its data set alone."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable

import jinja2

from s4g_ray.config.loading import load_config
from s4g_ray.data.dataset import open_dataset
from s4g_ray.data.sphere import format_metres
from s4g_ray.errors import InputError
from s4g_ray.pipeline.branches.branch import describe_branch
from s4g_ray.pipeline.report.charts import (
    draw_loss_chart,
    draw_maps,
    draw_recall_chart,
    draw_time_chart,
)
from s4g_ray.pipeline.report.examples import Example, RankedQueries, find_mined_examples
from s4g_ray.pipeline.run_folder import Record, read_records
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published


def write_report(run_dir: str, *, show: Callable[[list[Example]], None] | None = None) -> str:
    """Write RUN/report.html and return its URI.

    show() is called with the retrievals of the last evaluation that the page shows.

    Raises InputError when the folder holds no evaluated run.
    """
    uri = files.absolute(run_dir)
    if not files.exists(files.join(uri, "run.json")):
        raise InputError(f"{uri} is no run's folder: run.json is missing")
    records = read_records(uri)
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    if not evaluations:
        raise InputError(f"{uri} holds no evaluated run: nothing to report yet")
    last = evaluations[-1]["epoch"]
    if not is_published(files.join(uri, f"embeddings/v={last:04d}")):
        raise InputError(
            f"{uri} has no embeddings of its last evaluation, after epoch {last}: they were pruned"
            " before the run branched; resume it until its next evaluation"
        )
    config_text = files.read_bytes(files.join(uri, "config.yaml")).decode()
    config = load_config(files.join(uri, "config.yaml"))
    info = files.read_json(files.join(uri, "run.json"))
    dataset = open_dataset(info["dataset"]["uri"])
    retrieval = RankedQueries.read(uri, config, dataset, last)
    examples = list(retrieval.examples(config))
    if show is not None:
        show(examples)
    page = _template().render(
        run=uri.rstrip("/").rsplit("/", 1)[-1],
        info={"best": None, **info},
        views=dataset.views,
        config=config,
        config_text=config_text,
        rows=result_rows(records),
        format_metres=format_metres,
        evaluation=evaluations[-1],
        loss=draw_loss_chart(records),
        recall=draw_recall_chart(evaluations),
        times=draw_time_chart(records),
        maps=draw_maps(retrieval),
        examples=examples,
        negatives=list(find_mined_examples(uri, config, dataset)),
        mining=[r for r in records if r["kind"] == "mining"],
        epochs=[r for r in records if r["kind"] == "epoch"],
        branches=[describe_branch(r) for r in records if r["kind"] == "branch"],
        bad_images=read_records(uri, "bad_images.jsonl"),
    )
    target = files.join(uri, "report.html")
    files.write_bytes(target, page.encode())
    return target


def result_rows(records: list[Record]) -> list[tuple[str, Record]]:
    """Return the named rows of the results table, as far as they were evaluated.

    Untrained encoder, baseline, trained encoder, and the last one in the other protocol where that
    differs.
    """
    rows = [("gradient correlation", r) for r in records if r["kind"] == "baseline"]
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    if not evaluations:
        return rows
    first = evaluations[0]
    last = evaluations[-1]
    if first["epoch"] == 0:
        rows.insert(0, ("untrained encoder", first))
    if last["epoch"] > 0:
        rows.append((f"trained, epoch {last['epoch']}", last))
    other = "paper" if last["protocol"] == "strict" else "strict"
    if last[other]:
        rows.append((f"the same, protocol {other}", {**last, **last[other]}))
    return rows


def _template() -> jinja2.Template:
    folder = importlib.resources.files("s4g_ray.pipeline.report")
    text = folder.joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text)
