"""Typed records of a run: what each line of metrics.jsonl holds, as callbacks receive it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from typing import Any

from s4g_ray.storage import files


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A line of metrics.jsonl.

    kind: what it records. time: seconds since 1970. values: all keys of the line, those without a
    field of their own too; docs/guide.md describes them. A field is None where the line has no such
    key, or a value that is not finite. A kind without a class of its own is a plain RunRecord.
    """

    kind: str
    time: float
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class StepRecord(RunRecord):
    """The steps since the last such record: every train.log_every_steps.

    step: optimiser steps of all epochs so far. loss: mean over these steps and all workers.
    """

    epoch: int
    step: int
    loss: float | None = None
    learning_rate: float | None = None
    temperature: float | None = None


@dataclass(frozen=True, kw_only=True)
class EpochRecord(RunRecord):
    """A finished epoch, and its batch plan.

    step: the last step of the epoch. hardness: how many of an anchor's nearest places share its
    batch. load_s, step_s, wait_s, plan_s: seconds in which steps waited for images, of the steps
    themselves, in which workers waited for the plan, of planning. load_wait, wait_share: shares of
    the epoch. graph_age: epochs since its graph was mined. slowest_rank_s, fastest_rank_s: seconds
    that a rank spent on its own images, loading and forward passes, where it does not wait for
    others. gpu_memory_gb: the most of any rank. tflops, mfu: of a rank, of its peak.
    """

    epoch: int
    step: int
    loss: float | None = None
    learning_rate: float | None = None
    temperature: float | None = None
    workers: int | None = None
    pairs_per_s: float | None = None
    pairs_left_out: int | None = None
    pairs_masked: int | None = None
    steps_skipped: int | None = None
    hardness: float | None = None
    graph: str | None = None
    graph_age: int | None = None
    load_s: float | None = None
    load_wait: float | None = None
    step_s: float | None = None
    wait_s: float | None = None
    wait_share: float | None = None
    plan_s: float | None = None
    mining_overlap: float | None = None
    slowest_rank: int | None = None
    slowest_rank_s: float | None = None
    fastest_rank_s: float | None = None
    gpu_memory_gb: float | None = None
    tflops: float | None = None
    mfu: float | None = None


@dataclass(frozen=True, kw_only=True)
class SkippedRecord(RunRecord):
    """A step whose gradients were not finite, so that it changed nothing.

    rank: the worker that reports it. cause: which of its embeddings are not finite, if any.
    """

    epoch: int
    step: int
    rank: int
    cause: str = ""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(RunRecord):
    """The metrics of an epoch's checkpoint.

    kind: `evaluation` (data.test_split), `validation` (data.val_split) or `baseline` (gradient
    correlation, a method without learning). metrics: by name, such as `recall@1`; fractions, and
    median_error_m in metres. regions: the same by region.
    """

    epoch: int
    protocol: str | None = None
    metrics: Mapping[str, float]
    regions: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class MiningRecord(RunRecord):
    """A mined graph of an epoch's checkpoint.

    collection: of references, `pairs` or `gallery`. index: its kind, and index_reason why it is of
    this kind and in so many shards. recall: of the index, against exact search; with 95 %
    confidence from recall_low to recall_high. coverage: share of the wanted neighbors that were
    found. overlap: share of them that the graph before has too. above_positive: share of negatives
    that score above the query's own reference.
    """

    epoch: int
    collection: str
    index: str | None = None
    references: int | None = None
    shards: int | None = None
    index_reason: str | None = None
    recall: float | None = None
    recall_low: float | None = None
    recall_high: float | None = None
    places: int | None = None
    queries: int | None = None
    neighbors: int | None = None
    coverage: float | None = None
    overlap: float | None = None
    above_positive: float | None = None
    seconds: float | None = None
    index_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingRecord(RunRecord):
    """The embedding of an epoch's checkpoint, for mining or evaluation."""

    epoch: int
    splits: tuple[str, ...] = ()
    images: int | None = None
    seconds: float | None = None
    warm_images_per_s: float | None = None
    bad_images: int | None = None
    reused_parts: int | None = None


@dataclass(frozen=True, kw_only=True)
class RoundRecord(RunRecord):
    """The seconds of a finished round; None for a part that was not due or done before."""

    epoch: int
    embed_s: float | None = None
    mine_s: float | None = None
    evaluate_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RoundFailedRecord(RunRecord):
    """A failed try of a round. what: mining or evaluation. given_up: it was the last try."""

    epoch: int
    what: str | None = None
    attempt: int | None = None
    reason: str | None = None
    given_up: bool | None = None


@dataclass(frozen=True, kw_only=True)
class WorkersRecord(RunRecord):
    """Workers that start: at first, on resume, and after a worker was lost.

    Steps after `after_step` are repeated: records about them come again.
    """

    after_step: int
    during_epoch: int | None = None
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class LostRecord(RunRecord):
    """Workers that died, by rank."""

    during_epoch: int | None = None
    ranks: tuple[int, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class BadImagesRecord(RunRecord):
    """Images that could not be decoded; bad_images.jsonl lists them. new: how many were added."""

    new: int


_TYPES: dict[str, type[RunRecord]] = {
    "step": StepRecord,
    "epoch": EpochRecord,
    "skipped": SkippedRecord,
    "evaluation": EvaluationRecord,
    "validation": EvaluationRecord,
    "baseline": EvaluationRecord,
    "mining": MiningRecord,
    "embedding": EmbeddingRecord,
    "round": RoundRecord,
    "round_failed": RoundFailedRecord,
    "workers": WorkersRecord,
    "lost": LostRecord,
    "bad_images": BadImagesRecord,
}


def parse_record(line: Mapping[str, Any]) -> RunRecord:
    """Return the typed record of a line of metrics.jsonl.

    Other keys than the fields are in `values` alone. A line of an unknown kind, or one that lacks a
    key which its class requires, becomes a plain RunRecord.
    """
    values = copy.deepcopy(dict(line))
    record_type = _TYPES.get(line["kind"], RunRecord)
    given = dict(values)
    if record_type is EvaluationRecord:
        given["metrics"] = {
            key: value for key, value in values.items() if key not in _HEAD and _is_number(value)
        }
        given["regions"] = dict(values.get("regions") or {})
    given["values"] = values
    given.setdefault("time", time.time())
    required = {f.name for f in fields(record_type) if _is_required(f)}
    if not required <= given.keys():
        record_type = RunRecord
    names = {f.name for f in fields(record_type)} & given.keys()
    return record_type(**{name: _freeze(given[name]) for name in names})


_HEAD = {"time", "epoch", "step"}  # keys of a line that are no metrics of an evaluation


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_required(a_field: Any) -> bool:
    return a_field.default is MISSING and a_field.default_factory is MISSING


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_records(uri: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Read the records of a run's metrics.jsonl or bad_images.jsonl; none where it does not exist.

    A last line without an end is left out: its writer died while writing it.
    """
    path = files.join(uri, name)
    if not files.exists(path):
        return []
    return [
        json.loads(line)
        for line in files.read_bytes(path).splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
