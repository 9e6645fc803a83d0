"""Callbacks of a run: they receive each record when it is logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from s4g_ray.pipeline.records import RunRecord, parse_record


class Callback(Protocol):
    """Receives the records of a run, in the order in which they are logged, one at a time.

    Called in threads of the driver, which waits for it: return soon. An exception ends the run:
    `run` raises it, and published files stay, so that the run can be resumed.
    """

    def on_record(self, record: RunRecord) -> None:
        """Handle a record of the run."""
        ...


class CallbackList:
    """Calls callbacks with each line of metrics.jsonl, and keeps the error of one that fails.

    Lines are logged in threads that take exceptions for a failure of their own work, and try again.
    So the error is kept, and `check` raises it; no callback is called after it.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        self._error: Exception | None = None

    def handle_line(self, line: Mapping[str, Any]) -> None:
        """Call each callback with the record of a line."""
        if not self._callbacks or self._error is not None:
            return
        record = parse_record(line)
        try:
            for callback in self._callbacks:
                callback.on_record(record)
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raise the error of a callback that failed, if any."""
        if self._error is not None:
            raise self._error
