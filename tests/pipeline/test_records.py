from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from s4g_ray.pipeline.records import (
    BadImagesRecord,
    EmbeddingRecord,
    EpochRecord,
    EvaluationRecord,
    LostRecord,
    MiningRecord,
    RoundFailedRecord,
    RoundRecord,
    RunRecord,
    StepRecord,
    WorkersRecord,
    parse_record,
)

HEAD = {"time": 12.5}
STEP = {"kind": "step", **HEAD, "epoch": 2, "step": 7, "loss": 0.5, "temperature": 0.07}
EVALUATION: dict[str, Any] = {
    "kind": "evaluation",
    **HEAD,
    "epoch": 2,
    "protocol": "strict",
    "recall@1": 0.25,
    "queries": 4.0,
    "regions": {"North": {"recall@1": 0.5}},
    "paper": {"recall@1": 0.75},
}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (STEP, StepRecord),
        ({"kind": "epoch", **HEAD, "epoch": 2, "step": 7, "hardness": 1.5}, EpochRecord),
        (EVALUATION, EvaluationRecord),
        ({**EVALUATION, "kind": "validation"}, EvaluationRecord),
        ({**EVALUATION, "kind": "baseline"}, EvaluationRecord),
        (
            {"kind": "mining", **HEAD, "epoch": 1, "collection": "pairs", "recall": 0.9},
            MiningRecord,
        ),
        (
            {"kind": "embedding", **HEAD, "epoch": 1, "splits": ["train"], "images": 9},
            EmbeddingRecord,
        ),
        ({"kind": "round", **HEAD, "epoch": 1, "embed_s": 1.5}, RoundRecord),
        (
            {"kind": "round_failed", **HEAD, "epoch": 1, "what": "mining", "given_up": True},
            RoundFailedRecord,
        ),
        ({"kind": "workers", **HEAD, "after_step": 4, "workers": 2}, WorkersRecord),
        ({"kind": "lost", **HEAD, "ranks": [0, 2], "reason": "killed"}, LostRecord),
        ({"kind": "bad_images", "new": 3}, BadImagesRecord),
    ],
)
def test_a_line_becomes_the_record_of_its_kind_with_its_values_as_fields(
    line: dict[str, Any], expected: type[RunRecord]
) -> None:
    record = parse_record(line)
    assert type(record) is expected
    assert record.values == line
    own = {field.name for field in fields(record)} - {"kind", "values", "metrics", "regions"}
    for name in own - {"time"}:
        wanted = line.get(name)
        found = getattr(record, name)
        assert found == (tuple(wanted) if isinstance(wanted, list) else wanted) or found == ()


def test_an_evaluation_has_its_metrics_by_name_and_by_region() -> None:
    record = parse_record(EVALUATION)
    assert isinstance(record, EvaluationRecord)
    assert record.metrics == {"recall@1": 0.25, "queries": 4.0}
    assert record.regions == {"North": {"recall@1": 0.5}}
    assert record.time == 12.5


def test_keys_without_a_field_are_in_values() -> None:
    record = parse_record({**STEP, "gpu_memory_gb": 60.5})
    assert isinstance(record, StepRecord)
    assert record.values["gpu_memory_gb"] == 60.5
    assert record.learning_rate is None


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "branch", **HEAD, "from_epoch": 3},
        {"kind": "step", **HEAD, "loss": 0.5},  # no step
    ],
)
def test_lines_of_unknown_kinds_or_without_their_position_are_plain_records(
    line: dict[str, Any],
) -> None:
    record = parse_record(line)
    assert type(record) is RunRecord
    assert record.values == line


def test_changing_a_record_leaves_the_line_alone() -> None:
    record = parse_record(EVALUATION)
    record.values["regions"]["North"]["recall@1"] = 0.0
    assert EVALUATION["regions"] == {"North": {"recall@1": 0.5}}
