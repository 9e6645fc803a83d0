"""When a run mines and evaluates, and which graph an epoch uses: decided by configuration, and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from s4g_ray.config.schema import RunConfig

GEOGRAPHIC = 0  # the version of the graph that needs no mining


@dataclass(frozen=True)
class Schedule:
    """The epochs of a run, counted from 1; epoch 0 is the untrained encoder.

    A graph mined from epoch e is first used by epoch e + 1 + lag. Its age in an epoch is the number of epochs that
    were trained since it was mined; the geographic graph counts as mined at epoch 0.
    """

    config: RunConfig

    @property
    def epochs(self) -> int:
        """The last epoch."""
        return self.config.train.epochs

    @property
    def overlaps(self) -> bool:
        """Whether training goes on beside the rounds."""
        return self.config.mining.schedule == "overlap"

    def mines_after(self, epoch: int) -> bool:
        """Whether a mining round is due after an epoch: a later one must use its graph."""
        cfg = self.config.mining
        due = epoch > 0 and epoch % cfg.every_epochs == 0
        return (
            due and self.config.sampling.mode == "similarity" and epoch + 1 + cfg.lag <= self.epochs
        )

    def evaluates_after(self, epoch: int) -> bool:
        """Whether an evaluation is due after an epoch."""
        cfg = self.config.evaluation
        if epoch == 0:
            return cfg.before_training
        return epoch % cfg.every_epochs == 0 or epoch == self.epochs

    def version_for(self, epoch: int) -> int | None:
        """The graph that an epoch is to use: mined early enough, else geographic (0); None without neighbors."""
        mode, cfg = self.config.sampling.mode, self.config.mining
        if mode == "random":
            return None
        if mode == "geographic":
            return GEOGRAPHIC
        return max(GEOGRAPHIC, (epoch - 1 - cfg.lag) // cfg.every_epochs * cfg.every_epochs)

    def reusable(self, epoch: int, ready: Collection[int]) -> int | None:
        """The newest of some graphs that may stand in for the one that an epoch is to use; None where all are too old.

        It is no newer than that one, and no older than mining.max_staleness_epochs.
        """
        due = self.version_for(epoch)
        assert due is not None
        fitting = [
            v
            for v in ready
            if v <= due and self.age(v, epoch) <= self.config.mining.staleness_bound
        ]
        return max(fitting, default=None)

    def age(self, version: int, epoch: int) -> int:
        """Epochs that were trained between the mining of a graph and the start of an epoch."""
        return epoch - 1 - version
