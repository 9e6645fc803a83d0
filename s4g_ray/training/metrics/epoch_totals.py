"""Sum up the metrics of an epoch over its steps and ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.training.step import StepResult, describe_non_finite


@dataclass
class EpochTotals:
    """Sums of an epoch so far, over all ranks; checkpoints within the epoch keep them."""

    batches: int = 0
    loss: float = 0.0  # of the steps whose loss is finite
    finite: int = 0  # these steps
    masked: int = 0
    gallery_masked: int = 0
    skipped: int = 0
    load_s: float = 0.0  # waited for images, mean of the ranks
    seconds: float = 0.0
    wait_s: float = 0.0  # waited for the plan
    logged: int = 0  # finite steps in the lines of metrics.jsonl so far
    logged_loss: float = 0.0  # of these steps

    def take_mean_loss(self) -> float:
        """Return the mean loss of the steps that are in no line yet, and count them as logged.

        NaN where none of them has a finite loss.
        """
        count = self.finite - self.logged
        mean = (self.loss - self.logged_loss) / count if count else float("nan")
        self.logged = self.finite
        self.logged_loss = self.loss
        return mean

    def record(self, batch_size: int, has_gallery: bool) -> dict[str, float]:
        """Return the metrics of the finished epoch; has_gallery: with those of the gallery."""
        record = {
            "loss": self.loss / self.finite if self.finite else float("nan"),
            "pairs_per_s": self.batches * batch_size / self.seconds if self.seconds else 0.0,
            "pairs_masked": self.masked,
        }
        if has_gallery:
            record["gallery_masked"] = self.gallery_masked
        record["load_s"] = self.load_s
        record["load_wait"] = self.load_s / self.seconds if self.seconds else 0.0
        record["step_s"] = self.seconds - self.load_s
        record["steps_skipped"] = self.skipped
        record["wait_s"] = self.wait_s
        record["wait_share"] = self.wait_s / max(self.wait_s + self.seconds, 1e-9)
        return record


@dataclass(frozen=True)
class Reduced:
    """What ranks learn from each other when they meet: sums over ranks."""

    vote: int  # of rank 0
    num_ready: float  # batches loaded ahead, mean of the ranks
    skipped: list[bool]  # of the steps since the ranks met last


@dataclass
class StepWindow:
    """The steps since the ranks met last; their results stay on the device until then."""

    device: torch.device
    began: float = field(default_factory=time.perf_counter)
    batches: list[PairBatch] = field(default_factory=list)  # without images
    results: list[StepResult] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)

    def add(self, batch: PairBatch, result: StepResult, load_s: float) -> None:
        """Add a step; the images of its batch are not kept."""
        self.batches.append(batch.without_images())
        self.results.append(result)
        self.load_s.append(load_s)

    def reduce(self, totals: EpochTotals, *, vote: int, num_ready: int) -> Reduced:
        """Add the steps to the totals of all ranks, in one reduction, and empty the window.

        The sums are the same wherever ranks meet: steps are added one by one. vote: of rank 0; the
        other ranks give 0. num_ready: batches that this rank has loaded ahead.
        """
        rows = [
            [load_s, batch.pairs_masked, batch.gallery_masked]
            for batch, load_s in zip(self.batches, self.load_s, strict=True)
        ]
        counts = torch.tensor([*rows, [vote, num_ready, 0]], dtype=torch.float64)
        sums = torch.cat([self._stack_results(), counts.to(self.device)], dim=1)
        num_ranks = 1
        if dist.is_initialized():
            dist.all_reduce(sums)
            num_ranks = dist.get_world_size()
        *steps, last = sums.tolist()
        load_s = 0.0
        for loss, num_finite, num_skipped, step_load_s, masked, gallery_masked in steps:
            totals.batches += 1
            if num_finite == num_ranks:
                totals.loss += loss / num_ranks
                totals.finite += 1
            totals.skipped += int(num_skipped > 0)
            totals.masked += round(masked)
            totals.gallery_masked += round(gallery_masked)
            load_s += step_load_s / num_ranks
        now = time.perf_counter()
        totals.load_s += load_s
        totals.seconds += now - self.began
        self.began = now
        return Reduced(int(last[3]), last[4] / num_ranks, [row[2] > 0 for row in steps])

    def _stack_results(self) -> Tensor:
        """Return a row a step: loss, whether it is finite, whether skipped; and a row of zeros."""
        rows = []
        for result in self.results:
            loss = result.loss.double()
            is_finite = loss.isfinite()
            rows.append(
                torch.stack(
                    [loss.where(is_finite, 0.0), is_finite.double(), result.is_skipped.double()]
                )
            )
        rows.append(torch.zeros(3, dtype=torch.float64, device=self.device))
        return torch.stack(rows)

    def describe_skipped(self, skipped: list[bool]) -> list[tuple[int, str]]:
        """Return number and cause of each skipped step's batch, as far as this rank knows it."""
        found = []
        for batch, result, is_skipped in zip(self.batches, self.results, skipped, strict=True):
            if is_skipped:
                found.append((batch.number, describe_non_finite(batch, result.bad_rows)))
        return found

    def clear(self) -> None:
        """Forget the steps."""
        self.batches.clear()
        self.results.clear()
        self.load_s.clear()
