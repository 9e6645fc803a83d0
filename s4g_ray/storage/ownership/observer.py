"""LeaseObserver: whether a process writes a folder, as seen by another that only reads."""

from __future__ import annotations

import time
from dataclasses import dataclass

from s4g_ray.storage import files
from s4g_ray.storage.ownership import lease
from s4g_ray.storage.ownership.lease_files import FoundLease, open_lease_file, read_lease
from s4g_ray.storage.ownership.processes import name_machine

NEXT_BEAT_S = 15.0  # in which a process that seems to have ended gives a sign of life


@dataclass(frozen=True)
class Sighting:
    """What is known of a folder's writer. holder: none where it is empty.

    ended: why the holder writes no more; empty while it is alive. since: when it took the folder,
    in seconds since 1970 by its clock; 0 where that is not known.
    """

    holder: str = ""
    ended: str = ""
    since: float = 0.0

    @property
    def is_written(self) -> bool:
        """Return whether a living process holds the folder."""
        return bool(self.holder) and not self.ended


class LeaseObserver:
    """Looks at the lease of a folder, again and again. Writes nothing.

    A holder on this machine is asked for by its process id. One elsewhere lives while its heartbeat
    changes the lease, by this process's own clock; clocks of machines may differ.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._file = open_lease_file(files.join(folder, files.LEASE))
        self._machine = name_machine()
        self._found: FoundLease | None = None
        self._silent_from = 0.0  # time.monotonic()
        self._is_in_doubt = False  # its last heartbeat seems to be old, and none has come since

    def look(self) -> Sighting:
        """Look once. Raises InputError for a lease that cannot be read, StoreError."""
        found = read_lease(self._file, self._folder)
        before = self._found
        self._found = found
        if found is None:
            self._is_in_doubt = False
            return Sighting()
        holder = found.describe()
        since = 0.0 if found.owner is None else found.owner.since
        if found.owner is not None and found.owner.is_of(self._machine):
            self._is_in_doubt = False
            return Sighting(holder, "" if found.owner.is_alive() else lease.ENDED, since)
        now = time.monotonic()
        if before is None:
            age_s = lease.STALE_S + 1 if found.modified is None else time.time() - found.modified
            self._is_in_doubt = age_s > lease.STALE_S
            self._silent_from = now
        elif before.version != found.version:
            self._is_in_doubt = False
            self._silent_from = now
        return Sighting(holder, self._silence(now), since)

    def _silence(self, now: float) -> str:
        patience_s = NEXT_BEAT_S if self._is_in_doubt else lease.STALE_S
        if now - self._silent_from <= patience_s:
            return ""
        return f"it gave no sign of life for {lease.STALE_S:.0f} s"

    def look_until_sure(self) -> Sighting:
        """Look, and wait for a sign of life where the last one seems to be old."""
        sighting = self.look()
        while self._is_in_doubt and sighting.is_written:
            time.sleep(lease.POLL_S)
            sighting = self.look()
        return sighting
