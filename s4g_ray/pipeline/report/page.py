"""write_report: one self-contained page about a run, from its folder and its data set alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.errors import InputError
from s4g_ray.evaluation.query_results import QueryResults
from s4g_ray.evaluation.scores import search_tables
from s4g_ray.pipeline.branches.branch_record import describe_branch
from s4g_ray.pipeline.records import read_records
from s4g_ray.pipeline.report.charts import draw_loss_chart, draw_recall_chart, draw_time_chart
from s4g_ray.pipeline.report.examples import (
    NUM_TOP,
    Example,
    find_hardest,
    find_mined_examples,
    find_retrievals,
)
from s4g_ray.pipeline.report.region_map import draw_maps
from s4g_ray.pipeline.report.reliability import read_calibration
from s4g_ray.pipeline.report.templates import render_page
from s4g_ray.pipeline.run_folder import Record, describe_other_name
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published, open_published


@dataclass(frozen=True)
class EvaluatedRun:
    """A run of which at least one evaluation is logged."""

    uri: str
    config: RunConfig
    info: Record
    records: list[Record]

    @classmethod
    def read(cls, run_dir: str) -> EvaluatedRun:
        """Read a run's folder. Raises InputError when it holds no evaluated run."""
        uri = files.absolute(run_dir)
        if not files.exists(files.join(uri, "run.json")):
            raise InputError(f"{uri} is no run's folder: run.json is missing")
        records = read_records(uri)
        if not any(record["kind"] == "evaluation" for record in records):
            raise InputError(f"{uri} holds no evaluated run: nothing to report yet")
        config = load_config(files.join(uri, "config.yaml"))
        return cls(uri, config, files.read_json(files.join(uri, "run.json")), records)

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    def of_kind(self, kind: str) -> list[Record]:
        """Return the records of a kind."""
        return [record for record in self.records if record["kind"] == kind]


def write_report(
    run_dir: str,
    *,
    dataset: str | None = None,
    gallery: str | None = None,
    show: Callable[[list[Example]], None] | None = None,
) -> str:
    """Write RUN/report.html and return its URI.

    dataset: where the run's data set lies now, if it has moved. gallery: one whose calibration the
    page shows. show() is called with the retrievals of the last evaluation that the page shows.

    Raises InputError when the folder holds no evaluated run, or the gallery no calibration.
    """
    run = EvaluatedRun.read(run_dir)
    calibration = None
    if gallery is not None:
        calibration = read_calibration(gallery)
        calibration.lines.append(_describe_model_of(gallery, run.uri))
    results = read_results(run, dataset)
    config = run.config
    examples = list(find_retrievals(results, config))
    if show is not None:
        show(examples)
    evaluations = run.of_kind("evaluation")
    page = render_page(
        "report.html.j2",
        run=run.name,
        info={"best": None, **run.info},
        views=results.dataset.views,
        config=config,
        config_text=files.read_bytes(files.join(run.uri, "config.yaml")).decode(),
        rows=result_rows(run.records),
        evaluation=evaluations[-1],
        loss=draw_loss_chart(run.records),
        recall=draw_recall_chart(evaluations),
        times=draw_time_chart(run.records),
        maps=draw_maps(results),
        calibration=calibration,
        hardest=list(find_hardest(results, config)),
        has_semi_positives=len(results.semi_positives) > 0,
        examples=examples,
        negatives=list(find_mined_examples(run.uri, config, results.dataset)),
        mining=run.of_kind("mining"),
        epochs=run.of_kind("epoch"),
        branches=[describe_branch(record) for record in run.of_kind("branch")],
        bad_images=read_records(run.uri, "bad_images.jsonl"),
    )
    target = files.join(run.uri, "report.html")
    files.write_bytes(target, page)
    return target


def _describe_model_of(gallery: str, run_uri: str) -> str:
    """Say of which of the run's checkpoints a gallery's model is."""
    model = files.read_json(files.join(files.absolute(gallery), "gallery.json"))["model"]
    folder = files.join(run_uri, "checkpoints")
    for name in files.list_names(folder):
        uri = files.join(folder, name)
        if not is_published(uri):
            continue
        if open_published(uri, "checkpoint").info["weights_sha256"] == model["weights_sha256"]:
            return f"The gallery's model is this run's, of {name}."
    return (
        f"The gallery's model, {model['architecture']}, is none of this run's checkpoints: it is"
        " another run's, or of an epoch that was pruned."
    )


def read_results(run: EvaluatedRun, dataset_uri: str | None = None) -> QueryResults:
    """Search the test queries again, by the embeddings of the last evaluation.

    dataset_uri: as write_report. Raises InputError where the embeddings were pruned, and for a data
    set that is not the run's.
    """
    last = run.of_kind("evaluation")[-1]["epoch"]
    folder = files.join(run.uri, f"embeddings/v={last:04d}")
    if not is_published(folder):
        raise InputError(
            f"{run.uri} has no embeddings of its last evaluation, after epoch {last}: they were"
            " pruned before the run branched; resume it until its next evaluation"
        )
    dataset = _open_dataset_of(run, dataset_uri)
    split = run.config.data.test_split
    search = search_tables(dataset, split, folder, folder, num_top=NUM_TOP)
    return QueryResults.from_search(dataset, split, search)


def _open_dataset_of(run: EvaluatedRun, moved_to: str | None) -> GeoDataset:
    """Open a run's data set, where it was or where it has moved to."""
    known = run.info["dataset"]
    images = run.config.data.image_options
    uri = known["uri"]
    if moved_to is not None and files.absolute(moved_to) != uri:
        uri = files.absolute(moved_to)
        images = replace(images, root=None)  # its images moved with it, or as it says
    dataset = open_dataset(uri, images, remedy="if it has moved, name it with --dataset")
    if dataset.fingerprint != known["fingerprint"]:
        raise InputError(
            f"{run.uri} was made on another data set than {uri} now holds; name its own with"
            f" --dataset{describe_other_name(known, dataset)}"
        )
    return dataset


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


def result_values(run_dir: str) -> dict[str, Any]:
    """Return the results of a run as plain values, for JSON: those of the page's first table."""
    run = EvaluatedRun.read(run_dir)
    results = []
    for name, record in result_rows(run.records):
        values = {key: value for key, value in record.items() if key not in ("kind", "time")}
        results.append({"name": name, **values})
    dataset = run.info["dataset"]["name"]
    split = run.config.data.test_split
    return {"run_dir": run.uri, "dataset": dataset, "split": split, "results": results}
