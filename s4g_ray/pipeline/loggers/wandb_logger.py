"""WandbLogger: a run of Weights & Biases; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE ... apply."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from s4g_ray.pipeline.loggers.pictures import Picture
from s4g_ray.pipeline.loggers.points import Point


class WandbLogger:
    """Writes to a run of Weights & Biases, which a resumed run continues by its id.

    folder: for its files, unless WANDB_DIR is set; None for its default. Its x-axis is `step`,
    which counts optimiser steps: its own counter must rise, and evaluations come later than steps.
    """

    batch_size = 1

    def __init__(self, name: str, folder: str | None, config: Mapping[str, Any]) -> None:
        self._name = name
        self._folder = folder
        self._config = config
        self._run: Any = None

    def open(self, run_id: str | None, last_step: int) -> str:
        """Start a run, or continue the one with this id."""
        del last_step  # the tool appends; points that are written are not written again
        wandb = import_module("wandb")
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            name=self._name,
            dir=os.environ.get("WANDB_DIR") or self._folder,
            config=dict(self._config),
            allow_val_change=True,  # keys that may change on resume
            reinit="create_new",  # a run of the user's own stays as it is
            settings=wandb.Settings(console="off", quiet=True),  # leaves the run's output alone
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def write(self, points: Sequence[Point]) -> None:
        """Log each point as a row with its step and epoch."""
        for point in points:
            row: dict[str, float] = {"step": point.step, **point.values}
            if point.epoch is not None:
                row["epoch"] = point.epoch
            self._run.log(row)

    def show(self, pictures: Sequence[Picture], step: int) -> None:
        """Log pictures with their titles."""
        wandb = import_module("wandb")
        images = [wandb.Image(picture.image, caption=picture.title) for picture in pictures]
        self._run.log({"step": step, "retrievals": images})

    def commit(self) -> None:
        """Do nothing: a process of the client sends or stores what is logged."""

    def close(self, *, finished: bool) -> None:
        """Finish the run; one that is to be resumed counts as failed."""
        self._run.finish(exit_code=0 if finished else 1)
