"""RunLoggers: the loggers of a run, a callback that hands each record to all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from s4g_ray.config.loading import dump_config, flatten_config
from s4g_ray.config.schema import LoggerName, RunConfig
from s4g_ray.pipeline.branches.branch import flatten
from s4g_ray.pipeline.loggers.feed import Logger, LoggerFeed
from s4g_ray.pipeline.loggers.mlflow_logger import MlflowLogger
from s4g_ray.pipeline.loggers.points import PointReader
from s4g_ray.pipeline.loggers.tensorboard_logger import TensorBoardLogger
from s4g_ray.pipeline.loggers.wandb_logger import WandbLogger
from s4g_ray.pipeline.records import RunRecord, parse_record
from s4g_ray.pipeline.report.examples import Example
from s4g_ray.pipeline.run_folder import FREE_ON_RESUME, RunFolder
from s4g_ray.progress import Reporter
from s4g_ray.storage import files


class RunLoggers:
    """The loggers of a run, as one callback.

    close(): within how many seconds they are to end. line: shows a line to the user.
    """

    def __init__(self, feeds: Sequence[LoggerFeed]) -> None:
        self._feeds = tuple(feeds)
        self._reader = PointReader()
        self._last_evaluation = 0  # its step

    @classmethod
    def from_config(cls, config: RunConfig, folder: RunFolder, reporter: Reporter) -> Self:
        """Make the loggers of a configuration, which continue what they wrote for this folder."""
        origin = files.fingerprint(
            json.dumps(flatten(config, FREE_ON_RESUME), default=str).encode()
        )
        feeds = [
            LoggerFeed(
                name,
                _make_logger(name, config, folder),
                folder.path("loggers", f"{name}.json"),
                origin=origin,
                line=reporter.line,
            )
            for name in config.loggers
        ]
        return cls(feeds)

    def on_record(self, record: RunRecord) -> None:
        """Queue the point of a record for each logger."""
        point = self._reader.read(record)
        if point is None:
            return
        if record.kind == "evaluation":
            self._last_evaluation = point.step
        for feed in self._feeds:
            feed.put(point)

    def show(self, examples: Sequence[Example]) -> None:
        """Queue retrievals of the last evaluation for each logger, to be shown as pictures."""
        for feed in self._feeds:
            feed.show(examples, self._last_evaluation)

    @contextmanager
    def running(
        self, past: Sequence[dict[str, Any]], seconds_to_close: Callable[[], float]
    ) -> Iterator[None]:
        """Start the loggers with the records of a resumed run, and close them at the end.

        Points that a logger wrote before are left out. seconds_to_close(): the limit, at the end.
        """
        for line in past:
            self.on_record(parse_record(line))
        for feed in self._feeds:
            feed.start()
        finished = False
        try:
            yield
            finished = True
        finally:
            self._close(finished=finished, limit_s=seconds_to_close())

    def _close(self, *, finished: bool, limit_s: float) -> None:
        for feed in self._feeds:
            feed.end(finished=finished)
        deadline = time.monotonic() + limit_s
        for feed in self._feeds:
            feed.join(max(0.0, deadline - time.monotonic()))


def _make_logger(name: LoggerName, config: RunConfig, folder: RunFolder) -> Logger:
    run = folder.uri.rstrip("/").rsplit("/", 1)[-1]
    if name == "tensorboard":
        return TensorBoardLogger(folder.path("tensorboard"), dump_config(config))
    if name == "wandb":
        local = folder.uri if files.is_local(folder.uri) else None
        return WandbLogger(run, local, config.model_dump(mode="json"))
    return MlflowLogger(run, flatten_config(config))
