"""Schedule: when a run mines and evaluates, and which graph an epoch uses.

The configuration alone decides, so that a run does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from s4g_ray.config.schema import RunConfig

GEOGRAPHIC = 0  # the version of the graph that needs no mining


@dataclass(frozen=True)
class Schedule:
    """The epochs of a run, counted from 1; epoch 0 is the untrained encoder.

    A graph mined from epoch e is first used by epoch e + 1 + lag. Its age in an epoch is the number
    of epochs that were trained since it was mined; the geographic graph counts as mined at epoch 0.
    """

    config: RunConfig

    @property
    def epochs(self) -> int:
        """The last epoch."""
        return self.config.train.epochs

    @property
    def overlaps(self) -> bool:
        """Whether training continues beside the rounds."""
        return self.config.mining.schedule == "overlap"

    def mines_after(self, epoch: int) -> bool:
        """Whether a mining round is due after an epoch: a later one must use its graph."""
        cfg = self.config.mining
        if self.config.sampling.mode != "similarity" or epoch == 0:
            return False
        return epoch % cfg.every_epochs == 0 and epoch + 1 + cfg.lag <= self.epochs

    def evaluates_after(self, epoch: int) -> bool:
        """Whether an evaluation is due after an epoch."""
        cfg = self.config.evaluation
        if epoch == 0:
            return cfg.before_training
        return epoch % cfg.every_epochs == 0 or epoch == self.epochs

    def plans_ahead(self, epoch: int) -> bool:
        """Whether the epoch after this one may be planned and begin before this one's round ends.

        Where training waits for rounds, only where none is due.
        """
        return self.overlaps or not (self.mines_after(epoch) or self.evaluates_after(epoch))

    def version_for(self, epoch: int) -> int | None:
        """Return the version of the graph that an epoch is due to use.

        That is the newest one mined early enough, else the geographic one (0); None in mode random.
        """
        mode = self.config.sampling.mode
        cfg = self.config.mining
        if mode == "random":
            return None
        if mode == "geographic":
            return GEOGRAPHIC
        return max(GEOGRAPHIC, (epoch - 1 - cfg.lag) // cfg.every_epochs * cfg.every_epochs)

    def reusable(self, epoch: int, ready: Collection[int]) -> int | None:
        """Return the newest published graph that may replace the one due for an epoch.

        It is no newer than that one, and no older than mining.max_staleness_epochs; None where all
        are too old.
        """
        due = self.version_for(epoch)
        assert due is not None
        bound = self.config.mining.staleness_bound
        usable = [v for v in ready if v <= due and self.age(v, epoch) <= bound]
        return max(usable, default=None)

    def age(self, version: int, epoch: int) -> int:
        """Return the number of epochs trained between a graph's mining and an epoch's start."""
        return epoch - 1 - version
