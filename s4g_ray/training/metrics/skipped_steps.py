"""Count the steps that were skipped because their gradients were not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from s4g_ray.errors import RunError
from s4g_ray.training.metrics.epoch_totals import StepWindow

NON_FINITE_REMEDY = (
    "resume from an earlier checkpoint (--resume --from-epoch N) with a lower train.learning_rate,"
    " or with train.precision=fp32"
)


class SkippedSteps:
    """Counts the skipped steps in a row, the same on all ranks.

    limit: train.max_skipped_steps. in_a_row: of the checkpoint that training resumes from.
    """

    def __init__(self, limit: int, rank: int, in_a_row: int = 0) -> None:
        self.in_a_row = in_a_row
        self._limit = limit
        self._rank = rank

    def count(
        self, window: StepWindow, skipped: list[bool], *, step: int, epoch: int
    ) -> Iterator[dict[str, Any]]:
        """Count the steps of a window, the last of which is `step`, in an epoch (1, 2, ...).

        Yields what this rank reports: the steps for which it knows images to blame; rank 0 reports
        all. Raises RunError after too many skipped steps in a row.
        """
        causes = dict(window.describe_skipped(skipped))
        first = step - len(skipped) + 1
        for number, (batch, is_skipped) in enumerate(
            zip(window.batches, skipped, strict=True), start=first
        ):
            if not is_skipped:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            cause = causes[batch.number]
            if cause or self._rank == 0:
                yield {"step": number, "epoch": epoch, "rank": self._rank, "cause": cause}
            if self.in_a_row >= self._limit:
                where = f"step {number} (epoch {epoch}, batch {batch.number} of its plan)"
                raise RunError(
                    f"the gradients of {self.in_a_row} steps in a row are not finite"
                    f" (train.max_skipped_steps={self._limit}), the last of them at"
                    f" {where}{'; ' if cause else ''}{cause}; {NON_FINITE_REMEDY}"
                )
