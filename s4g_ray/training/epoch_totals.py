"""Sum up the metrics of an epoch over its steps and ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EpochTotals:
    """Sums of an epoch so far, over all ranks; checkpoints within the epoch keep them."""

    batches: int = 0
    loss: float = 0.0
    masked: int = 0
    gallery_masked: int = 0
    skipped: int = 0
    load_s: float = 0.0  # waited for images, mean of the ranks
    seconds: float = 0.0
    wait_s: float = 0.0  # waited for the plan
    logged: int = 0  # batches in the lines of metrics.jsonl so far
    logged_loss: float = 0.0  # of these batches

    def take_mean_loss(self) -> float:
        """Return the mean loss of the batches that are in no line yet, and count them as logged."""
        mean = (self.loss - self.logged_loss) / (self.batches - self.logged)
        self.logged = self.batches
        self.logged_loss = self.loss
        return mean

    def record(self, batch_size: int, has_gallery: bool) -> dict[str, float]:
        """Return the metrics of the finished epoch; has_gallery: with those of the gallery."""
        record = {
            "loss": self.loss / max(self.batches, 1),
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
