"""Sums over steps: the same wherever ranks meet, with skipped steps counted apart."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch

from s4g_ray.errors import RunError
from s4g_ray.training.metrics.epoch_totals import EpochTotals, StepWindow
from s4g_ray.training.metrics.skipped_steps import SkippedSteps
from s4g_ray.training.step import StepResult
from tests.support.step_batches import CPU, PAIRS, make_batch

LOSSES = [0.1, 0.2, 0.3, math.nan, 0.7, 1e-3, 0.11]
SKIPPED = [3, 4]


def add_step(window: StepWindow, number: int) -> None:
    bad_rows = torch.zeros(2 * PAIRS, dtype=torch.bool)
    bad_rows[2] = number == 3
    result = StepResult(torch.tensor(LOSSES[number]), torch.tensor(number in SKIPPED), bad_rows)
    window.add(replace(make_batch(masked=[1]), number=number), result, load_s=0.5)


def run(meetings: list[int]) -> EpochTotals:
    """Add all steps; ranks meet after the given ones."""
    totals = EpochTotals()
    window = StepWindow(CPU)
    for number in range(len(LOSSES)):
        add_step(window, number)
        if number in meetings:
            reduced = window.reduce(totals, vote=2, num_ready=4)
            assert (reduced.vote, reduced.num_ready) == (2, 4)
            window.clear()
    return totals


def test_sums_do_not_depend_on_where_ranks_meet() -> None:
    last = len(LOSSES) - 1
    found = [asdict(run(meetings)) for meetings in ([last], [0, 2, last], list(range(last + 1)))]
    for totals in found:
        assert totals.pop("seconds") > 0
    assert found[0] == found[1] == found[2]
    assert (found[0]["batches"], found[0]["finite"], found[0]["skipped"]) == (7, 6, 2)
    single = [torch.tensor(loss).item() for loss in LOSSES if loss == loss]
    assert found[0]["loss"] == sum(single)
    assert (found[0]["masked"], found[0]["load_s"]) == (7, 3.5)


def test_a_line_without_a_finite_loss_has_none() -> None:
    totals = EpochTotals(batches=2, loss=3.0, finite=2)
    assert totals.take_mean_loss() == 1.5
    assert math.isnan(totals.take_mean_loss())
    assert math.isnan(EpochTotals(batches=1).record(16, has_gallery=False)["loss"])


def test_skipped_steps_are_reported_with_the_images_to_blame() -> None:
    window = StepWindow(CPU)
    for number in range(len(LOSSES)):
        add_step(window, number)
    skipped = window.reduce(EpochTotals(), vote=0, num_ready=0).skipped
    first_rank = SkippedSteps(3, rank=0, in_a_row=1)
    reports = list(first_rank.count(window, skipped, step=27, epoch=2))
    assert [(report["step"], report["cause"]) for report in reports] == [
        (24, "non-finite embeddings for query ids [32]"),
        (25, ""),
    ]
    assert first_rank.in_a_row == 0
    others = list(SkippedSteps(3, rank=1).count(window, skipped, step=27, epoch=2))
    assert [report["step"] for report in others] == [24]


def test_too_many_skipped_steps_in_a_row_end_the_run_across_meetings() -> None:
    counter = SkippedSteps(3, rank=0)
    window = StepWindow(CPU)
    add_step(window, 3)
    add_step(window, 4)
    assert len(list(counter.count(window, [True, True], step=12, epoch=2))) == 2
    assert counter.in_a_row == 2
    window.clear()
    add_step(window, 3)
    message = (
        r"^the gradients of 3 steps in a row are not finite \(train\.max_skipped_steps=3\), the"
        r" last of them at step 13 \(epoch 2, batch 3 of its plan\); non-finite embeddings for"
        r" query ids \[32\]; resume from an earlier checkpoint \(--resume --from-epoch N\)"
    )
    last = counter.count(window, [True], step=13, epoch=2)
    assert next(last)["step"] == 13  # reported before the end
    with pytest.raises(RunError, match=message):
        next(last)
