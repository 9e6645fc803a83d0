"""Exporter: a run's records and queue lengths as Ray metrics, for Prometheus.

Ray puts `ray_` before each name and `_total` after that of a counter, which appears once it has
counted. Values are set in the driver's memory. A thread of Ray's sends them to the node's agent
every 10 s and writes failures to the session's log, so a run neither waits for its metrics nor
fails with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge


class Metric(NamedTuple):
    """A metric of a run. Each has the tag `run`, beside the tags named here."""

    kind: Literal["gauge", "counter"]
    text: str
    tags: tuple[str, ...] = ()


PRINTABLE = " !#$&'()*+,/:;=?@[]~"  # in ASCII, beside letters, digits and _.-
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

# kind of a record -> {field: metric}
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
    """A value that a gauge is set to, or that a counter rises by."""

    name: str
    value: float
    tags: Tags = {}  # noqa: RUF012 (never changed)


def samples_of(record: Record, splits: Mapping[str, str]) -> Iterator[Sample]:
    """Yield the samples of a record of metrics.jsonl; null gives none.

    splits: the split that a kind of record is about.
    """
    kind = record["kind"]
    for field, name in _FIELDS.get(kind, {}).items():
        if record.get(field) is not None:
            yield Sample(name, record[field])
    if kind in splits:
        for field, value in record.items():
            rank = re.fullmatch(r"recall@(\d+%?)", field)
            if rank and value is not None:
                yield Sample("s4g_recall", value, {"split": splits[kind], "rank": rank[1]})
    elif kind == "mining" and record.get("recall") is not None:
        yield Sample("s4g_index_recall", record["recall"], {"collection": record["collection"]})
    elif kind == "round":
        seconds = sum(value for field, value in record.items() if field.endswith("_s"))
        yield Sample("s4g_round_seconds", seconds)
    elif kind == "round_failed":
        yield Sample("s4g_rounds_failed", 1)
    elif kind == "lost":
        yield Sample("s4g_workers", 0)  # until they have started again
        yield Sample("s4g_workers_lost", len(record["ranks"]))
    elif kind == "bad_images":
        yield Sample("s4g_bad_images", record["new"])


def last_values(records: Iterable[Record], splits: Mapping[str, str]) -> list[Sample]:
    """Return the last value of each gauge after these records."""
    samples = (sample for record in records for sample in samples_of(record, splits))
    gauges = (sample for sample in samples if METRICS[sample.name].kind == "gauge")
    return list({(sample.name, *sample.tags.items()): sample for sample in gauges}.values())


def run_tag(run: str) -> str:
    """Return the last two parts of a run's folder: `s3://bucket/runs/earth` -> `runs/earth`.

    Ray takes tags in ASCII alone: other characters are percent-encoded.
    """
    path = run.rpartition("://")[2]
    parts = [part for part in path.split("/") if part]
    return quote("/".join(parts[-2:]), safe=PRINTABLE)


class Exporter:
    """Sets a run's metrics in the driver's process. Ray must be initialised.

    run: its folder, which gives the tag `run`. past: records of a resumed run. Gauges start at
    their last values; counters start at 0, as Prometheus expects of a new process.
    """

    def __init__(self, run: str, splits: Mapping[str, str], past: Iterable[Record] = ()) -> None:
        self._splits = dict(splits)
        self._metrics: dict[str, Gauge | Counter] = {}
        for name, metric in METRICS.items():
            make = Gauge if metric.kind == "gauge" else Counter
            made = make(name, metric.text, ("run", *metric.tags))
            self._metrics[name] = made.set_default_tags({"run": run_tag(run)})
        for sample in last_values(past, self._splits):
            self._put(sample)

    def export(self, record: Record) -> None:
        """Export the samples of a record."""
        for sample in samples_of(record, self._splits):
            self._put(sample)

    def show_queue(self, queue: Literal["rounds", "plans", "batches"], length: float) -> None:
        """Export a queue's length: rounds, plans of later epochs, batches loaded ahead."""
        self._put(Sample("s4g_queue_length", length, {"queue": queue}))

    def _put(self, sample: Sample) -> None:
        metric = self._metrics[sample.name]
        if isinstance(metric, Counter):
            metric.inc(sample.value, sample.tags)
        else:
            metric.set(sample.value, sample.tags)
