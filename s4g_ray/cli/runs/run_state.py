"""Gather what a run's records tell: epochs, recall, workers, and the time that is left."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from s4g_ray.pipeline.records import (
    EpochRecord,
    EvaluationRecord,
    LostRecord,
    RoundFailedRecord,
    RunRecord,
    SkippedRecord,
    StepRecord,
    WorkersRecord,
    parse_record,
    read_records,
)
from s4g_ray.storage import files


@dataclass
class EpochRow:
    """An epoch. time: when it ended. recall: of the test split; val_recall: of data.val_split.

    wait_share, load_wait: shares of the epoch in which workers waited for their plan, for images.
    """

    epoch: int
    time: float | None = None
    step: int | None = None
    loss: float | None = None
    recall: float | None = None
    val_recall: float | None = None
    hardness: float | None = None
    wait_share: float | None = None
    load_wait: float | None = None
    pairs_per_s: float | None = None


class RunState:
    """What is known of a run from its records so far. num_epochs: those that it is to train.

    workers: None until they have started. notes: failures, the newest last.
    """

    def __init__(self, uri: str, num_epochs: int) -> None:
        self.uri = uri
        self.num_epochs = num_epochs
        self.rows: dict[int, EpochRow] = {}
        self.workers: int | None = None
        self.step: StepRecord | None = None
        self.notes: list[str] = []
        self.changed: float | None = None  # time of the newest record
        self.is_trained = True  # workers are at it, or start
        self._begun: float | None = None  # when the workers started last

    def add(self, record: RunRecord) -> None:
        """Take a record into account, in the order in which records are logged."""
        self.changed = record.time
        if isinstance(record, EpochRecord):
            self._add_epoch(record)
        elif isinstance(record, EvaluationRecord):
            self._add_evaluation(record)
        elif isinstance(record, StepRecord):
            self.step = record
        elif isinstance(record, WorkersRecord):
            self._start_workers(record)
        elif isinstance(record, LostRecord):
            self.workers = None
            ranks = " and ".join(map(str, record.ranks))
            self.notes.append(f"lost worker {ranks}: {record.reason}")
        elif isinstance(record, SkippedRecord):
            self.notes.append(f"skipped step {record.step}: its gradients were not finite")
        elif isinstance(record, RoundFailedRecord):
            self.notes.append(f"{record.what} after epoch {record.epoch} failed: {record.reason}")

    def end_workers(self) -> None:
        """Take into account that the workers of the records have ended."""
        self.is_trained = False
        self.workers = None

    @property
    def last_epoch(self) -> int:
        """Return the last epoch that has ended; 0 before the first."""
        rows = list(self.rows.values())  # other threads add rows
        return max((row.epoch for row in rows if row.time is not None), default=0)

    def seconds_left(self, now: float) -> float | None:
        """Return the expected seconds until the last epoch ends.

        By the median time of the epochs since the workers started last, rounds between included,
        and of the one in progress where it takes longer than that. None before an epoch has ended,
        and where the workers have ended.
        """
        if not self.is_trained:
            return None
        ended = sorted(
            row.time
            for row in list(self.rows.values())  # other threads add rows
            if row.time is not None and (self._begun is None or row.time >= self._begun)
        )
        if self._begun is not None:
            ended = [self._begun, *ended]
        if len(ended) < 2:
            return None
        took = [end - begin for begin, end in itertools.pairwise(ended)]
        since = max(0.0, now - ended[-1])
        if since > statistics.median(took):
            took.append(since)
        each = statistics.median(took)
        return max(0.0, each * (self.num_epochs - self.last_epoch) - min(since, each))

    def as_dict(self, now: float) -> dict[str, Any]:
        """Return the state as JSON."""
        return {
            "run": self.uri,
            "epochs": self.num_epochs,
            "last_epoch": self.last_epoch,
            "step": None if self.step is None else self.step.step,
            "loss": None if self.step is None else self.step.loss,
            "workers": self.workers,
            "changed": self.changed,
            "seconds_left": self.seconds_left(now),
            "rows": [asdict(row) for _, row in sorted(self.rows.items())],
            "notes": self.notes,
        }

    def _row(self, epoch: int) -> EpochRow:
        return self.rows.setdefault(epoch, EpochRow(epoch))

    def _add_epoch(self, record: EpochRecord) -> None:
        row = self._row(record.epoch)
        row.time = record.time
        row.step = record.step
        row.loss = record.loss
        row.hardness = record.hardness
        row.wait_share = record.wait_share
        row.load_wait = record.load_wait
        row.pairs_per_s = record.pairs_per_s

    def _add_evaluation(self, record: EvaluationRecord) -> None:
        recall = record.metrics.get("recall@1")
        if record.kind == "evaluation":
            self._row(record.epoch).recall = recall
        elif record.kind == "validation":
            self._row(record.epoch).val_recall = recall

    def _start_workers(self, record: WorkersRecord) -> None:
        """Forget what is trained anew: all after the checkpoint that the workers start from."""
        self.workers = record.workers
        self._begun = record.time
        after = record.after_step
        kept = {epoch: row for epoch, row in self.rows.items() if (row.step or 0) <= after}
        self.rows = kept
        if self.step is not None and self.step.step > after:
            self.step = None


def read_state(uri: str, num_epochs: int) -> RunState:
    """Read the state of a run from its records; an empty one where it has none."""
    uri = files.absolute(uri)
    state = RunState(uri, num_epochs)
    for record in read_records(uri):
        state.add(parse_record(record))
    return state
