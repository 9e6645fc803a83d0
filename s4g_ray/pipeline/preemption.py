"""SIGTERM: what tells a run that its machine is to be taken away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class PreemptedError(Exception):
    """The run was told to end."""


class Preemption:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self._told = threading.Event()

    def check(self) -> None:
        """Raises PreemptedError once it has."""
        if self._told.is_set():
            raise PreemptedError

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notice SIGTERM meanwhile, instead of dying of it. Signals reach the main thread only: elsewhere, nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def tell(_number: int, _frame: FrameType | None) -> None:
            self._told.set()

        before = signal.signal(signal.SIGTERM, tell)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
