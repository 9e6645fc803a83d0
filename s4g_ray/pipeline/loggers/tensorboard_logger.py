"""TensorBoardLogger: event files in the run's folder, which `tensorboard --logdir` shows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from s4g_ray.pipeline.loggers.pictures import Picture
from s4g_ray.pipeline.loggers.points import Point
from s4g_ray.storage import files


class TensorBoardLogger:
    """Writes event files to `folder`; below an object store, to a temporary folder first.

    They are uploaded there at each commit. A resumed run writes a new file, which hides the points
    of earlier files after the last step that is known to be written.
    """

    batch_size = 1

    def __init__(self, folder: str, config_text: str) -> None:
        self._folder = folder
        self._config_text = config_text
        self._writer: Any = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def open(self, run_id: str | None, last_step: int) -> str:
        """Open a new event file. The id of a run is its folder."""
        local = self._folder
        if not files.is_local(self._folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="s4g-tensorboard-")
            local = self._temporary.name
        tensorboard = import_module("torch.utils.tensorboard")
        self._writer = tensorboard.SummaryWriter(log_dir=local, purge_step=last_step + 1)
        if run_id is None:
            text = "".join(f"    {line}\n" for line in self._config_text.splitlines())
            self._writer.add_text("config", text, 0)
        return self._folder

    def write(self, points: Sequence[Point]) -> None:
        """Add the scalars of points."""
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, walltime=point.time)

    def show(self, pictures: Sequence[Picture], step: int) -> None:
        """Add pictures, numbered; titles are not unique."""
        for number, picture in enumerate(pictures, start=1):
            pixels = np.asarray(picture.image)
            self._writer.add_image(f"retrievals/{number}", pixels, step, dataformats="HWC")

    def commit(self) -> None:
        """Flush the event file, and upload it where the run's folder is in an object store."""
        self._writer.flush()
        if self._temporary is None:
            return
        for path in Path(self._temporary.name).iterdir():
            files.write_bytes(files.join(self._folder, path.name), path.read_bytes())

    def close(self, *, finished: bool) -> None:
        """Close the event file."""
        del finished
        self._writer.close()
        if self._temporary is not None:
            self._temporary.cleanup()
