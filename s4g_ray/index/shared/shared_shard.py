"""Serve one shard to all processes that search it, and stop when none does. No Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from s4g_ray.index.sharded.shard import IndexShard
from s4g_ray.index.sharded.versions import ShardSetup

USER_S = 60.0  # without a sign, after which a user counts as gone
START_S = 60.0  # without any user, from the start on
LOOK_S = 1.0


class SharedShard(IndexShard):
    """A shard of a published version, with its users: processes that give signs.

    stop: ends the shard for good. It is called once, when the last user has left or gave no sign
    for user_s, and when none came for start_s.
    """

    def __init__(
        self,
        setup: ShardSetup,
        stop: Callable[[], None],
        user_s: float = USER_S,
        start_s: float = START_S,
    ) -> None:
        super().__init__(setup)
        self._stop = stop
        self._user_s = user_s
        self._lock = threading.Lock()
        self._signs: dict[str, float] = {}  # time.monotonic() of each user's last sign
        self._num_joining = 0  # users that wait for the version to be loaded give no signs
        self._empty_until = time.monotonic() + start_s
        self._is_stopping = threading.Event()
        threading.Thread(target=self._watch, name="users", daemon=True).start()

    def join(self, user: str, version: int) -> int:
        """Count a user in, wait until the version is loaded, and return its number of vectors.

        Raises RunError for a version that cannot be loaded.
        """
        with self._lock:
            self._num_joining += 1
        try:
            return self.require_version(version).num_vectors
        finally:
            with self._lock:
                self._num_joining -= 1
                self._signs[user] = time.monotonic()

    def beat(self, user: str) -> None:
        """Take a sign of a user."""
        with self._lock:
            self._signs[user] = time.monotonic()

    def leave(self, user: str) -> None:
        """Count a user out. The last one stops the shard."""
        with self._lock:
            self._signs.pop(user, None)
            is_last = not self._signs and not self._num_joining
        if is_last:
            self._end()

    def count_users(self) -> int:
        """Return the number of users."""
        with self._lock:
            return len(self._signs)

    def _watch(self) -> None:
        """Stop the shard when no user is left."""
        while not self._is_stopping.wait(LOOK_S):
            if not self._has_users():
                self._end()

    def _has_users(self) -> bool:
        """Drop users that are gone; return whether one is left, or may still come."""
        now = time.monotonic()
        with self._lock:
            for user in [one for one, sign in self._signs.items() if now > sign + self._user_s]:
                del self._signs[user]
            return bool(self._signs) or self._num_joining > 0 or now < self._empty_until

    def _end(self) -> None:
        with self._lock:
            if self._is_stopping.is_set():
                return
            self._is_stopping.set()
        self._stop()
