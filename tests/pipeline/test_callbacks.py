from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from s4g_ray.pipeline.callbacks import CallbackList
from s4g_ray.pipeline.records import RunRecord, StepRecord


class Kept:
    def __init__(self) -> None:
        self.records: list[RunRecord] = []

    def on_record(self, record: RunRecord) -> None:
        self.records.append(record)


class Failing(Kept):
    def on_record(self, record: RunRecord) -> None:
        super().on_record(record)
        if isinstance(record, StepRecord) and record.step == 2:
            raise OSError("the user's disk is full")


def line(step: int) -> dict[str, object]:
    return {"kind": "step", "time": 1.0, "epoch": 1, "step": step, "loss": 0.5}


def test_each_callback_receives_each_record_in_order() -> None:
    first = Kept()
    second = Kept()
    callbacks = CallbackList([first, second])
    for step in (1, 2, 3):
        callbacks.handle_line(line(step))
    callbacks.check()
    assert [record.values["step"] for record in first.records] == [1, 2, 3]
    assert first.records == second.records


def test_an_error_is_kept_for_the_thread_that_checks_and_ends_the_calls() -> None:
    before = Kept()
    failing = Failing()
    after = Kept()
    callbacks = CallbackList([before, failing, after])
    for step in (1, 2, 3):
        callbacks.handle_line(line(step))
    assert [len(kept.records) for kept in (before, failing, after)] == [2, 2, 1]
    for _ in range(2):  # in each thread that checks
        with pytest.raises(OSError, match="the user's disk is full"):
            callbacks.check()


def test_the_callback_of_the_guide_prints_losses_and_recall(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/guide.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    runs: list[tuple[object, Any]] = []
    monkeypatch.setattr("s4g_ray.load_config", lambda path: path)
    monkeypatch.setattr("s4g_ray.run", lambda config, callbacks: runs.append((config, callbacks)))
    exec(compile(code, "guide.md", "exec"), {})  # a page of this repository
    ((config, callbacks),) = runs
    assert config == "configs/mine.yaml"
    received = CallbackList(callbacks)
    received.handle_line(line(3))
    received.handle_line({"kind": "evaluation", "time": 1.0, "epoch": 2, "recall@1": 0.25})
    received.check()
    assert capsys.readouterr().out == "3 0.5\n2 0.25\n"
