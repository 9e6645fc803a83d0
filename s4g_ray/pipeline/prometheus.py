"""What a run exports through Ray's metrics, for Prometheus: what its driver logs, and what waits.

Ray puts `ray_` before each name and `_total` after a counter's, which is there once it has counted. Values are set in
the driver's memory; Ray sends them to the node's agent every 10 s by a thread of its own, and writes what fails there
to its session's log: a run neither waits for its metrics nor fails with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from ray.util.metrics import Counter, Gauge


class Metric(NamedTuple):
    """A metric of ours: every one has the tag `run`, beside those named here."""

    kind: Literal["gauge", "counter"]
    text: str
    tags: tuple[str, ...] = ()


METRICS = {
    "s4g_epoch": Metric("gauge", "The last finished epoch"),
    "s4g_step": Metric("gauge", "Optimiser steps so far"),
    "s4g_workers": Metric("gauge", "Training workers"),
    "s4g_workers_lost": Metric("counter", "Training workers that died"),
    "s4g_loss": Metric("gauge", "Training loss, mean of the last logged steps"),
    "s4g_learning_rate": Metric("gauge", "Learning rate of the last step"),
    "s4g_temperature": Metric("gauge", "Temperature of the loss"),
    "s4g_pairs_per_second": Metric(
        "gauge", "Pairs trained per second, over all workers, in the last epoch"
    ),
    "s4g_load_wait_ratio": Metric(
        "gauge", "Share of the last epoch in which workers waited for images"
    ),
    "s4g_mining_wait_ratio": Metric(
        "gauge", "Share of the last epoch in which workers waited for its plan"
    ),
    "s4g_graph_age_epochs": Metric("gauge", "Epochs since the graph of the last epoch was mined"),
    "s4g_hardness": Metric(
        "gauge", "Mean number of an anchor's nearest neighbors in its batch, last epoch"
    ),
    "s4g_pairs_left_out": Metric("gauge", "Pairs of the last epoch that no batch took"),
    "s4g_recall": Metric("gauge", "Recall of the last evaluation", ("split", "rank")),
    "s4g_index_recall": Metric(
        "gauge", "Recall of the index against exact search, last round", ("collection",)
    ),
    "s4g_embedding_images_per_second": Metric(
        "gauge", "Images embedded per second by warm actors, last round"
    ),
    "s4g_round_seconds": Metric(
        "gauge", "Seconds of the last round: embedding, mining, evaluation"
    ),
    "s4g_rounds_failed": Metric("counter", "Rounds that failed and were tried again or left out"),
    "s4g_queue_length": Metric(
        "gauge", "What waits: rounds, plans, batches loaded ahead", ("queue",)
    ),
    "s4g_bad_images": Metric("counter", "Images that could not be decoded and were left out"),
}

Record = Mapping[str, Any]  # a line of metrics.jsonl
Tags = dict[str, str]

# kind of a line: which of its fields is which metric
_FIELDS = {
    "step": {
        "step": "s4g_step",
        "loss": "s4g_loss",
        "learning_rate": "s4g_learning_rate",
        "temperature": "s4g_temperature",
    },
    "epoch": {
        "epoch": "s4g_epoch",
        "step": "s4g_step",
        "pairs_per_s": "s4g_pairs_per_second",
        "load_wait": "s4g_load_wait_ratio",
        "wait_share": "s4g_mining_wait_ratio",
        "graph_age": "s4g_graph_age_epochs",
        "hardness": "s4g_hardness",
        "pairs_left_out": "s4g_pairs_left_out",
    },
    "workers": {"workers": "s4g_workers"},
    "embedding": {"warm_images_per_s": "s4g_embedding_images_per_second"},
}


class Sample(NamedTuple):
    """A value of a metric: what it is set to, or what a counter rises by."""

    name: str
    value: float
    tags: Tags = {}  # noqa: RUF012 (never changed)


def samples_of(record: Record, splits: Mapping[str, str]) -> Iterator[Sample]:
    """What a line of metrics.jsonl tells; null tells nothing. splits: which one a kind of line is about."""
    kind = record["kind"]
    for field, name in _FIELDS.get(kind, {}).items():
        if record.get(field) is not None:
            yield Sample(name, record[field])
    if kind in splits:
        for field, value in record.items():
            if (rank := re.fullmatch(r"recall@(\d+%?)", field)) and value is not None:
                yield Sample("s4g_recall", value, {"split": splits[kind], "rank": rank[1]})
    elif kind == "mining" and record.get("recall") is not None:
        yield Sample("s4g_index_recall", record["recall"], {"collection": record["collection"]})
    elif kind == "round":
        yield Sample(
            "s4g_round_seconds",
            sum(value for field, value in record.items() if field.endswith("_s")),
        )
    elif kind == "round_failed":
        yield Sample("s4g_rounds_failed", 1)
    elif kind == "lost":
        yield Sample("s4g_workers", 0)  # until they have started again
        yield Sample("s4g_workers_lost", len(record["ranks"]))
    elif kind == "bad_images":
        yield Sample("s4g_bad_images", record["new"])


def last_values(records: Iterable[Record], splits: Mapping[str, str]) -> list[Sample]:
    """What gauges show after some lines."""
    samples = (sample for record in records for sample in samples_of(record, splits))
    gauges = (sample for sample in samples if METRICS[sample.name].kind == "gauge")
    return list({(sample.name, *sample.tags.items()): sample for sample in gauges}.values())


def run_tag(run: str) -> str:
    """The last two parts of a run's folder: `s3://bucket/runs/earth` -> `runs/earth`."""
    return "/".join([part for part in run.rpartition("://")[2].split("/") if part][-2:])


class Exporter:
    """Sets a run's metrics, in the process of its driver. Ray must be initialised.

    run: its folder, whose tag all of them have. past: lines of a run that goes on; gauges show their last values,
    while counters count what this process has seen, as Prometheus expects of a process that started anew.
    """

    def __init__(self, run: str, splits: Mapping[str, str], past: Iterable[Record] = ()) -> None:
        self._splits = dict(splits)
        made = {"gauge": Gauge, "counter": Counter}
        self._metrics: dict[str, Gauge | Counter] = {
            name: made[metric.kind](name, metric.text, ("run", *metric.tags)).set_default_tags(
                {"run": run_tag(run)}
            )
            for name, metric in METRICS.items()
        }
        for sample in last_values(past, self._splits):
            self._put(sample)

    def hear(self, record: Record) -> None:
        """Export what a line tells."""
        for sample in samples_of(record, self._splits):
            self._put(sample)

    def show_queue(self, queue: Literal["rounds", "plans", "batches"], length: float) -> None:
        """Export how much waits: rounds, plans of epochs to come, batches that a worker has loaded ahead."""
        self._put(Sample("s4g_queue_length", length, {"queue": queue}))

    def _put(self, sample: Sample) -> None:
        metric = self._metrics[sample.name]
        if isinstance(metric, Counter):
            metric.inc(sample.value, sample.tags)
        else:
            metric.set(sample.value, sample.tags)
