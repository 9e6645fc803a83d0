"""Preemption: SIGTERM, by which schedulers announce that they take the machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class PreemptedError(Exception):
    """SIGTERM has ended the run. Its text is a line about the newest checkpoint, if it began."""


class Preemption:
    """Remembers whether SIGTERM has come."""

    def __init__(self) -> None:
        self._signalled = threading.Event()

    def check(self) -> None:
        """Raise PreemptedError once SIGTERM has come."""
        if self._signalled.is_set():
            raise PreemptedError

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Catch SIGTERM within the block.

        Signals reach the main thread alone: in another thread this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(_number: int, _frame: FrameType | None) -> None:
            self._signalled.set()

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
