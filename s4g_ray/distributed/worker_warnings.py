"""Show warnings of NCCL that workers print: their output goes to log files on their nodes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

# NCCL's own warnings, and torch's message when a collective operation ends after its timeout
WARNING = re.compile(r"NCCL (WARN|ERROR)|Watchdog caught collective operation timeout")
NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
POLL_S = 1.0
SHOWN = 20  # different warnings; ranks repeat the same ones


class WarningFilter:
    """Finds the warnings among lines that workers print, each once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def find_new(self, lines: Sequence[str]) -> list[str]:
        """Return the warnings that differ from earlier ones in more than numbers.

        After SHOWN warnings, none.
        """
        found = []
        for line in lines:
            if not WARNING.search(line):
                continue
            kind = NUMBER.sub("0", line)
            if kind not in self._seen and len(self._seen) < SHOWN:
                self._seen.add(kind)
                found.append(line.strip())
        return found


@contextmanager
def shown_warnings(show: Callable[[str], None]) -> Iterator[None]:
    """Call `show` within the block for each new warning of this job's workers, with its node.

    Ray sends the lines of all processes to a driver that subscribes to them, from every node.
    """
    context = ray.get_runtime_context()
    raylet: Any = ray._raylet
    subscriber = raylet.GcsLogSubscriber(address=context.gcs_address)
    subscriber.subscribe()
    ended = threading.Event()

    def follow() -> None:
        warnings = WarningFilter()
        while not ended.is_set():
            try:
                lines: dict[str, Any] | None = subscriber.poll(timeout=POLL_S)
            except (OSError, RayError):  # the cluster is gone: the run ends of itself
                return
            if lines is None:  # Ray's store does not answer
                ended.wait(POLL_S)
            elif lines["job"] == context.get_job_id():
                for warning in warnings.find_new(lines["lines"]):
                    show(f"           {lines['ip']}: {warning}")

    thread = threading.Thread(target=follow, name="worker-warnings", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * POLL_S)
        subscriber.close()
