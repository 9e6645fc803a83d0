"""LoggerFeed: a thread that writes points to one logger, each once, and again after a failure."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from s4g_ray.pipeline.loggers.pictures import Picture, draw_retrievals
from s4g_ray.pipeline.loggers.points import Point
from s4g_ray.pipeline.report.examples import Example
from s4g_ray.storage import files

RETRY_S = 5.0  # after a first failure; doubled after each further one
LONGEST_RETRY_S = 120.0
COMMIT_S = 1.0  # between two commits, where the run's folder is local
OBJECT_COMMIT_S = 30.0  # where it is in an object store, which takes whole objects only


class Logger(Protocol):
    """A tool that shows points. One thread makes all calls; any exception counts as a failure.

    batch_size: the largest number of points in one call of `write`.
    """

    batch_size: int

    def open(self, run_id: str | None, last_step: int) -> str:
        """Open the tool's run and return its id: a new one, or the one that was written before.

        last_step: the largest step of a point that is written; -1 for none.
        """
        ...

    def write(self, points: Sequence[Point]) -> None:
        """Write points."""
        ...

    def show(self, pictures: Sequence[Picture], step: int) -> None:
        """Write pictures of retrievals."""
        ...

    def commit(self) -> None:
        """Make lasting what is written so far."""
        ...

    def close(self, *, finished: bool) -> None:
        """Close the tool's run. finished: false for a run that may be resumed."""
        ...


@dataclass
class Written:
    """What a logger has written, as kept in the run's folder for a resumed run.

    origin: of which configuration. run_id: of the tool's run. step: the last StepRecord. last_step:
    the largest step of any point. keys: of the other points.
    """

    origin: str
    run_id: str | None = None
    step: int = -1
    last_step: int = -1
    keys: list[str] = field(default_factory=list)

    def add(self, point: Point) -> None:
        """Note that a point is written."""
        self.last_step = max(self.last_step, point.step)
        if point.is_step:
            self.step = max(self.step, point.step)
        else:
            self.keys.append(point.key)


@dataclass(frozen=True)
class _Retrievals:
    examples: Sequence[Example]
    step: int


class LoggerFeed:
    """Writes the points of a run to a logger, beside the run, which neither waits nor fails.

    uri: of the file that keeps what is written. origin: names the configuration that the points are
    of; what was written for another one does not count, and the logger starts a new run.
    line: shows a line to the user, in any thread.
    """

    def __init__(
        self, name: str, logger: Logger, uri: str, *, origin: str, line: Callable[[str], None]
    ) -> None:
        self._name = name
        self._logger = logger
        self._uri = uri
        self._line = line
        self._written = _read_written(uri, origin)
        self._known_step = self._written.step  # written, or waiting to be
        self._known = set(self._written.keys)
        self._waiting: deque[Point | _Retrievals] = deque()
        self._is_open = False
        self._dirty = False  # points are written and not committed
        self._committed = time.monotonic()
        self._num_failures = 0  # in a row
        self._closing = False
        self._finished = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"{name} logger", daemon=True)

    def start(self) -> None:
        """Start the thread, which opens the logger."""
        self._thread.start()

    def put(self, point: Point) -> None:
        """Queue a point, unless the same one is written or queued."""
        with self._changed:
            if point.is_step:
                if point.step <= self._known_step:
                    return
                self._known_step = point.step
            else:
                if point.key in self._known:
                    return
                self._known.add(point.key)
            self._waiting.append(point)
            self._changed.notify_all()

    def show(self, examples: Sequence[Example], step: int) -> None:
        """Queue retrievals, whose pictures are drawn in the thread."""
        with self._changed:
            self._waiting.append(_Retrievals(examples, step))
            self._changed.notify_all()

    def end(self, *, finished: bool) -> None:
        """Have the thread write what waits, once more after a failure, and close the logger."""
        with self._changed:
            self._closing = True
            self._finished = finished
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end, and report what is not written."""
        self._thread.join(timeout_s)
        with self._changed:
            num_left = len(self._waiting)
        if num_left:
            self._line(f"{self._name}: {num_left} records were not written; metrics.jsonl has them")
        elif self._thread.is_alive():
            self._line(f"{self._name}: not closed within {timeout_s:.0f} s")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, timeout=self._seconds_to_commit())
                batch = self._next_batch()
                is_last = self._closing and not self._waiting
            try:
                self._open()
                self._write(batch)
                self._commit(is_due=is_last or self._is_worth_a_commit(batch))
                if is_last:
                    self._logger.close(finished=self._finished)
                    return
            except Exception as error:
                self._report_failure(error)
                if self._wait_after_failure():
                    return
            else:
                self._report_success()

    def _has_work(self) -> bool:
        return bool(self._waiting) or self._closing or not self._is_open

    def _seconds_to_commit(self) -> float | None:
        if not self._dirty:
            return None
        period = COMMIT_S if files.is_local(self._uri) else OBJECT_COMMIT_S
        return max(0.0, self._committed + period - time.monotonic())

    def _next_batch(self) -> list[Point | _Retrievals]:
        """Return what is written next: pictures alone, or up to batch_size points."""
        batch: list[Point | _Retrievals] = []
        for item in self._waiting:
            if isinstance(item, _Retrievals):
                return batch or [item]
            if len(batch) == self._logger.batch_size:
                break
            batch.append(item)
        return batch

    def _open(self) -> None:
        if self._is_open:
            return
        self._written.run_id = self._logger.open(self._written.run_id, self._written.last_step)
        self._is_open = True
        self._save()

    def _write(self, batch: Sequence[Point | _Retrievals]) -> None:
        """Write a batch; it stays in the queue until it is written."""
        points = [item for item in batch if isinstance(item, Point)]
        if points:
            self._logger.write(points)
        for item in batch:
            if isinstance(item, _Retrievals):
                self._logger.show(draw_retrievals(item.examples), item.step)
        for point in points:
            self._written.add(point)
        with self._changed:
            for _ in batch:
                self._waiting.popleft()
        self._dirty = self._dirty or bool(batch)

    def _is_worth_a_commit(self, batch: Sequence[Point | _Retrievals]) -> bool:
        """Whether a batch holds more than steps, and a commit is cheap."""
        has_steps_alone = all(isinstance(item, Point) and item.is_step for item in batch)
        return files.is_local(self._uri) and not has_steps_alone

    def _commit(self, *, is_due: bool) -> None:
        if self._dirty and (is_due or self._seconds_to_commit() == 0):
            self._logger.commit()
            self._save()
            self._committed = time.monotonic()
            self._dirty = False

    def _save(self) -> None:
        files.write_json(self._uri, asdict(self._written))

    def _report_failure(self, error: Exception) -> None:
        self._num_failures += 1
        if self._num_failures == 1:
            reason = " ".join(str(error).split()) or "no reason given"
            self._line(
                f"{self._name}: cannot write ({type(error).__name__}: {reason}); the run continues;"
                " records wait, and are written when a later try succeeds"
            )

    def _report_success(self) -> None:
        if self._num_failures:
            self._line(f"{self._name}: writing again after {self._num_failures} failures")
        self._num_failures = 0

    def _wait_after_failure(self) -> bool:
        """Wait until the next try; return whether there is none, because the run has ended."""
        wait_s = min(RETRY_S * 2 ** (self._num_failures - 1), LONGEST_RETRY_S)
        with self._changed:
            if self._closing:
                return True
            self._changed.wait_for(lambda: self._closing, timeout=wait_s)
            return False


def _read_written(uri: str, origin: str) -> Written:
    """Read what a logger has written of this configuration."""
    if files.exists(uri):
        values: dict[str, Any] = files.read_json(uri)
        if values.get("origin") == origin:
            return Written(**values)
    return Written(origin)
