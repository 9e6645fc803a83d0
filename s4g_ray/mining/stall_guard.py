"""StallGuard: find that a job has stopped, by a time that its own pace sets. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable

from s4g_ray.errors import RunError

FLOOR_S = 1800.0  # a lost node may take so long to be replaced
PATIENCE = 20.0  # times the longest pause so far
# floating-point operations a second of a slow shard; a processor core has 10 times as many
SLOW_RATE = 1e10


def expected_block_s(num_references: int, dim: int, num_queries: int, num_at_once: int) -> float:
    """Return the seconds that a block of queries takes at most, before any was measured.

    num_at_once: blocks that share the index.
    """
    return 2.0 * num_references * dim * num_queries * num_at_once / SLOW_RATE


class StallGuard:
    """Raises when nothing has changed for far longer than between the changes before.

    first_s: the seconds that the first block of queries may take; FLOOR_S at least.
    """

    def __init__(self, first_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_s = first_s
        self._longest_s: float | None = None
        self._state: object = None
        self._changed_at = clock()

    @property
    def limit_s(self) -> float:
        """Return the longest pause that is allowed now."""
        expected_s = self._first_s
        if self._longest_s is not None:
            expected_s = PATIENCE * self._longest_s
        return max(FLOOR_S, expected_s)

    def check(self, state: object) -> None:
        """Note the state of the job. Raises RunError when it stays the same beyond limit_s."""
        now = self._clock()
        pause_s = now - self._changed_at
        if state != self._state:
            if self._state is not None:
                self._longest_s = max(self._longest_s or 0.0, pause_s)
            self._state = state
            self._changed_at = now
        elif pause_s > self.limit_s:
            raise RunError(
                f"no block of queries was answered for {pause_s:.0f} s, at most"
                f" {self.limit_s:.0f} s are expected; see whether index shards and searching tasks"
                " find room and answer"
            )
