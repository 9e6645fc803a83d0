"""Turn records into points: named numbers at a step of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from s4g_ray.pipeline.records import (
    BadImagesRecord,
    EpochRecord,
    LostRecord,
    MiningRecord,
    RunRecord,
    StepRecord,
    WorkersRecord,
)

# keys of a record that say where it stands, and are no values
_POSITION = {"time", "epoch", "step", "after_step", "during_epoch"}


@dataclass(frozen=True)
class Point:
    """The numbers of a record, by name, at a step.

    key: names the record, so that it is written once. is_step: of a StepRecord; their steps rise.
    time: seconds since 1970.
    """

    key: str
    step: int
    time: float
    values: Mapping[str, float]
    is_step: bool = False
    epoch: int | None = None


class PointReader:
    """Turns the records of a run into points, in the order in which they were logged.

    A value is named KIND/KEY, as in metrics.jsonl: `step/loss`, `evaluation/recall@1`,
    `mining/pairs/coverage`. A record about an epoch stands at the epoch's last step.
    """

    def __init__(self) -> None:
        self._last_steps = {0: 0}  # by epoch
        self._step = 0  # the newest

    def read(self, record: RunRecord) -> Point | None:
        """Return the point of a record; None for one without numbers.

        Bad images are not in metrics.jsonl, and give no point: a resumed run could not tell which
        of them were written.
        """
        if isinstance(record, EpochRecord):
            self._last_steps[record.epoch] = record.step
        if isinstance(record, BadImagesRecord):
            return None
        values = dict(_name_values(record))
        if not values:
            return None
        step = self._find_step(record)
        self._step = max(self._step, step)
        return Point(
            key=_name_record(record),
            step=step,
            time=record.time,
            values=values,
            is_step=isinstance(record, StepRecord),
            epoch=record.values.get("epoch"),
        )

    def _find_step(self, record: RunRecord) -> int:
        if isinstance(record, WorkersRecord):
            return record.after_step
        step = record.values.get("step")
        if isinstance(step, int):
            return step
        return self._last_steps.get(record.values.get("epoch", -1), self._step)


def _name_record(record: RunRecord) -> str:
    """Return what a record is about: a repeated record has the same name.

    Events, such as a lost worker, are never repeated; their time tells them apart.
    """
    if isinstance(record, StepRecord):
        return f"step {record.step}"
    if isinstance(record, MiningRecord):
        return f"mining {record.collection} {record.epoch}"
    if "epoch" in record.values and record.kind != "round_failed":
        return f"{record.kind} {record.values['epoch']}"
    return f"{record.kind} at {record.time:.3f}"


def _name_values(record: RunRecord) -> Iterator[tuple[str, float]]:
    prefix = record.kind
    if isinstance(record, MiningRecord):
        prefix += f"/{record.collection}"
    if isinstance(record, LostRecord):
        yield f"{prefix}/workers", len(record.ranks)
    for key, value in record.values.items():
        if key not in _POSITION:
            yield from _flatten(f"{prefix}/{key}", value)


def _flatten(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a value, by name; those of nested mappings with a longer name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(f"{name}/{key}", item)
    elif isinstance(value, int | float) and math.isfinite(value):
        yield name, float(value)
