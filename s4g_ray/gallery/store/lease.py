"""Let one process at a time write a gallery: a lease file with its owner and a heartbeat.

A local lease is created exclusively. An object store is written and read back: of two writers at
the same moment, the later one keeps the lease, and both check it again before they publish.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from s4g_ray.distributed.processes import is_alive
from s4g_ray.errors import InputError, RunError, StoreError
from s4g_ray.progress import Reporter
from s4g_ray.storage import files

LEASE = "writer.json"
BEAT_S = 10.0  # between two heartbeats
STALE_S = 60.0  # without a heartbeat, after which a lease is taken over
SETTLE_S = 0.5  # in which writers that began at the same moment see each other


class Lease:
    """The right to write a gallery, kept by a heartbeat until it is released."""

    def __init__(self, gallery: str) -> None:
        self._gallery = gallery
        self._uri = files.join(gallery, LEASE)
        self._value: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
            "since": time.time(),
        }
        self._checked = 0.0  # time.time() of the last check
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="gallery-lease", daemon=True)

    def acquire(self, reporter: Reporter) -> None:
        """Take the lease. Raises InputError when another writer holds it and is alive."""
        if not self._create():
            other = self._read()
            if other == {}:  # cut short, or written just now where links are missing
                time.sleep(SETTLE_S)
                other = self._read()
            if other is not None:
                why = _why_stale(other)
                if why is None:
                    raise self._refuse(other)
                reporter.line(f"took over {self._gallery} from {_name(other)}: {why}")
            self._write()
            time.sleep(SETTLE_S)
        elif not files.is_local(self._uri):
            time.sleep(SETTLE_S)
        self.check()
        self._thread.start()

    @property
    def token(self) -> str:
        """Eight hex digits that no other lease has, for names of files."""
        return str(self._value["token"])[:8]

    def check(self, *, every_s: float = 0.0) -> None:
        """Raise InputError when another writer has taken the lease.

        Does nothing where it was checked less than every_s ago.
        """
        now = time.time()
        if 0 <= now - self._checked < every_s:
            return
        other = self._read()
        if other is None or other.get("token") != self._value["token"]:
            taker = _name(other) if other else "another process, which has ended"
            raise InputError(
                f"the lease of {self._gallery} was taken over by {taker}; nothing was published;"
                " run the command again when no other process writes the gallery"
            )
        self._checked = now

    def release(self) -> None:
        """End the heartbeat and remove the lease, if it is still this one."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(RunError):
            other = self._read()
            if other is not None and other.get("token") == self._value["token"]:
                files.remove(self._uri)

    def _create(self) -> bool:
        """Write the lease where there is none; return whether it was written."""
        if not files.is_local(self._uri):
            if self._read() is not None:
                return False
            self._write()
            return True
        target = Path(self._uri)
        whole = target.with_name(f".{LEASE}.{self._value['token']}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            whole.write_text(json.dumps(self._stamped()))
            _link(whole, target)
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError(f"cannot write to {self._gallery}: {error}") from error
        finally:
            whole.unlink(missing_ok=True)
        return True

    def _stamped(self) -> dict[str, Any]:
        return {**self._value, "heartbeat": time.time()}

    def _write(self) -> None:
        files.write_json(self._uri, self._stamped())

    def _read(self) -> dict[str, Any] | None:
        """Read the lease; None where there is none, {} for one that is cut short.

        Raises StoreError when the object store fails.
        """
        try:
            value = files.read_json(self._uri)
        except FileNotFoundError:
            return None
        except StoreError:
            raise
        except RunError:
            value = {}
        return value if isinstance(value, dict) else {}

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(RunError, OSError):
                other = self._read()
                if other is None or other.get("token") != self._value["token"]:
                    return  # lost; check() tells the writer before it publishes
                self._write()

    def _refuse(self, other: dict[str, Any]) -> InputError:
        age = max(0.0, time.time() - float(other.get("heartbeat", 0)))
        return InputError(
            f"{self._gallery} is being written by {_name(other)} (last sign {age:.0f} s ago);"
            f" wait until it ends; a writer that died is replaced after {STALE_S:.0f} s"
        )


@contextmanager
def writing(gallery: str, reporter: Reporter) -> Iterator[Lease]:
    """Hold the lease of a gallery in the block. Raises InputError as Lease.acquire."""
    lease = Lease(gallery)
    lease.acquire(reporter)
    try:
        yield lease
    finally:
        lease.release()


def _link(whole: Path, target: Path) -> None:
    """Give a file another name. Raises FileExistsError where there is a file of that name."""
    try:
        os.link(whole, target)  # readers never see a part of it
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as exFAT
        with target.open("x") as file:
            file.write(whole.read_text())


def _name(other: dict[str, Any]) -> str:
    return f"process {other.get('pid', '?')} on {other.get('host', '?')}"


def _why_stale(other: dict[str, Any]) -> str | None:
    """Return why a lease is held by nobody; None while its writer seems alive."""
    try:
        age = time.time() - float(other["heartbeat"])
        pid = int(other["pid"])
    except (KeyError, TypeError, ValueError):
        return "its lease is damaged"
    if age > STALE_S:
        return f"it gave no sign for {age:.0f} s"
    # containers may share a host's name, but not its processes: a living one gives signs
    is_due = age > 2 * BEAT_S
    if is_due and other.get("host") == socket.gethostname() and not is_alive(pid):
        return "it has ended"
    return None
