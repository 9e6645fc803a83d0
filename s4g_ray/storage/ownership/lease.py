"""Lease: the right to write a folder, kept by a heartbeat until it is released."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from s4g_ray.errors import InputError, OwnershipLostError, RunError
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.ownership import lease_files
from s4g_ray.storage.ownership.lease_files import FoundLease, open_lease_file, read_lease
from s4g_ray.storage.ownership.owner import Owner

BEAT_S = 10.0  # between two heartbeats
STALE_S = 60.0  # without a heartbeat, after which a lease is taken over
POLL_S = 1.0  # between two looks for a heartbeat
LAST_BEAT_S = 10.0  # for a heartbeat in progress to end, before the lease is removed
_held: set[Lease] = set()  # the leases of this process
STOLEN = "--steal; waiting for it to stop"
ENDED = "it has ended"
TRIES = 5  # to take a lease that changes hands meanwhile


class Lease:
    """The right to write a folder. Its methods may be called from any thread.

    interrupts: raise KeyboardInterrupt in the main thread when the lease is lost, for work that
    does not ask by check() or watch(); `owning` makes an OwnershipLostError of it.
    """

    def __init__(self, folder: str, *, interrupts: bool = False) -> None:
        self._folder = folder
        self._interrupts = interrupts
        self._owner = Owner.of_this_process()
        self._file = open_lease_file(files.join(folder, files.LEASE))
        self._confirmed = 0.0  # time.monotonic() when the lease was last seen to be this one
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def token(self) -> str:
        """Eight hex digits that no other lease has, for names of files."""
        return self._owner.token[:8]

    def acquire(self, reporter: Reporter, *, steal: bool = False) -> None:
        """Take the lease.

        A lease of a process of this machine that has ended is taken over; so is one without a
        heartbeat for STALE_S, for which this waits. steal: also one of a living process, which
        stops within a heartbeat; this waits for that. Raises InputError when another process holds
        the lease and is alive, and for a folder that cannot be written to.
        """
        for _ in range(TRIES):
            if self._file.create(self._owner):
                break
            found = read_lease(self._file, self._folder)
            if found is None:  # it ended a moment ago
                continue
            if found.is_of(self._owner):  # written, and only the answer of the disk was lost
                break
            why = self._find_reason(found, reporter, steal=steal)
            if why and self._file.replace(self._owner, found):
                reporter.line(f"took over {self._folder} from {found.describe()}: {why}")
                if why == STOLEN:
                    time.sleep(BEAT_S + lease_files.SETTLE_S)  # until that process has noticed
                break
        else:
            raise InputError(
                f"several processes are about to write {self._folder}; run the command again when"
                " one is left"
            )
        self._confirmed = time.monotonic()
        self._thread.start()
        _held.add(self)

    def check(self, *, every_s: float = 0.0) -> None:
        """Raise OwnershipLostError when another process has taken the lease.

        Reads it, unless it was seen less than every_s ago. Raises StoreError when the store fails.
        """
        if not self._lost.is_set():
            if time.monotonic() - self._confirmed < every_s:
                return
            try:
                found = self._file.read()
            except PermissionError:  # that of another user has replaced it
                found = None
            if found is not None and found.is_of(self._owner):
                self._confirmed = time.monotonic()
                return
            self._lost.set()
        raise self._loss()

    def watch(self) -> None:
        """Raise OwnershipLostError when a heartbeat has found the lease taken. Cheap.

        Reads it where heartbeats are late: this process may have been halted meanwhile.
        """
        if self._lost.is_set():
            raise self._loss()
        if time.monotonic() - self._confirmed > STALE_S:
            with suppress(RunError, OSError):
                self.check()
                return
            if self._lost.is_set():
                raise self._loss()
            self._confirmed = time.monotonic() - STALE_S + BEAT_S  # the store fails: not each time

    def release(self) -> None:
        """End the heartbeat and remove the lease, if it is still this one."""
        self._ended.set()
        _held.discard(self)
        if self._thread.is_alive():
            self._thread.join(LAST_BEAT_S)
        if self._thread.is_alive():  # the store does not answer: the lease becomes stale by itself
            return
        with suppress(RunError, OSError):
            self._file.remove(self._owner)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(Exception):  # of any client: the next heartbeat tries again
                if not self._file.beat(self._owner):
                    self._lost.set()
                    if self._interrupts:
                        # a signal, because it wakes a thread that waits, too
                        signal.pthread_kill(_main_thread_id(), signal.SIGINT)
                    return
                self._confirmed = time.monotonic()

    def _find_reason(self, found: FoundLease, reporter: Reporter, *, steal: bool) -> str:
        """Return why a lease may be taken over; empty when it has changed meanwhile.

        Raises InputError while its owner is alive.
        """
        owner = found.owner
        is_here = owner is not None and owner.is_of(self._owner.machine)
        if owner is not None and is_here and not owner.is_alive():
            return ENDED
        if steal:  # at once: a sign of life meanwhile would be in the way
            return STOLEN
        age_s = self._file.age_s(self._owner, found)
        if age_s is not None and age_s > STALE_S and not is_here:
            return f"it gave no sign of life for {age_s:.0f} s"
        if is_here:
            raise self._refuse(found, age_s)
        if owner is None:
            time.sleep(lease_files.SETTLE_S)  # it may be written just now
            return "its lease is damaged" if self._is_same(found) else ""
        return self._await_beat(found, age_s or 0.0, reporter)

    def _await_beat(self, found: FoundLease, age_s: float, reporter: Reporter) -> str:
        """Wait for a sign of life of an owner on another machine; return as _find_reason."""
        left_s = STALE_S - age_s
        reporter.line(
            f"{self._folder} is held by {found.describe()}; waiting up to {left_s:.0f} s for a sign"
            " of life"
        )
        deadline = time.monotonic() + left_s
        while time.monotonic() < deadline:
            time.sleep(min(POLL_S, left_s))
            now = self._file.read()
            if now is None or now.owner != found.owner:
                return ""
            if now.version != found.version:
                raise self._refuse(now, 0.0)
        return f"it gave no sign of life for {STALE_S:.0f} s"

    def _is_same(self, found: FoundLease) -> bool:
        now = self._file.read()
        return now is not None and now.version == found.version

    def _refuse(self, found: FoundLease, age_s: float | None) -> InputError:
        since = found.owner.describe_since() if found.owner else "an unknown time"
        seen = "" if age_s is None else f", last sign of life {age_s:.0f} s ago"
        return InputError(
            f"{self._folder} is being written by {found.describe()} since {since}{seen}; wait"
            " until it ends, or stop it; if you know that it writes no more, take over with --steal"
        )

    def _loss(self) -> OwnershipLostError:
        found = None
        with suppress(RunError, OSError):
            found = self._file.read()
        taker = found.describe() if found else "another process, which has ended"
        return OwnershipLostError(
            f"{self._folder} was taken over by {taker}: this process has stopped, and publishes"
            " nothing more; run the command again when no other process writes there"
        )


def raise_if_lost() -> None:
    """Raise OwnershipLostError when a lease of this process is lost."""
    for lease in list(_held):
        lease.watch()


@contextmanager
def owning(
    folder: str,
    reporter: Reporter | None = None,
    *,
    steal: bool = False,
    interrupts: bool = False,
) -> Iterator[Lease]:
    """Hold the lease of a folder in the block.

    interrupts: end the block with an OwnershipLostError when the lease is lost, also where it does
    not ask. Raises InputError as Lease.acquire.
    """
    lease = Lease(folder, interrupts=interrupts)
    try:
        lease.acquire(reporter or Reporter(), steal=steal)
        try:
            yield lease
        except KeyboardInterrupt:
            lease.watch()
            raise
    finally:
        lease.release()


def _main_thread_id() -> int:
    number = threading.main_thread().ident
    assert number is not None
    return number
