"""The file of a lease: created where there is none, replaced where it is as it was found.

On a disk a heartbeat sets the file's time, so that it counts by the clock of the disk or of its
server, and never brings back a lease that was replaced. On an object store it is a conditional
write, which fails where another process has written. Stores without conditions are written and
read back after a while: of processes that write at the same moment, the last one keeps the lease.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.ownership.owner import Owner
from s4g_ray.storage.s3_settings import is_object_store
from s4g_ray.storage.store_errors import NoConditionsError, reraise_outage

SETTLE_S = 0.5  # in which processes that write at the same moment see each other


@dataclass(frozen=True)
class FoundLease:
    """A lease as it lies in its folder."""

    owner: Owner | None  # None: the file is damaged
    version: Any  # changes with every heartbeat
    modified: float | None  # seconds, by the store's clock; None: not known

    def is_of(self, owner: Owner) -> bool:
        """Return whether the lease is that of an owner."""
        return self.owner is not None and self.owner.token == owner.token

    def describe(self) -> str:
        """Return who holds it."""
        return self.owner.describe() if self.owner else "a process whose lease is damaged"


class LeaseFile(Protocol):
    """The file of a lease. Methods raise StoreError when the store fails, and OSError."""

    def read(self) -> FoundLease | None:
        """Read the lease; None where there is none."""

    def create(self, owner: Owner) -> bool:
        """Write the lease where there is none; return whether it is the owner's."""

    def replace(self, owner: Owner, found: FoundLease) -> bool:
        """Write the lease in place of the one that was found; return whether it is the owner's."""

    def beat(self, owner: Owner) -> bool:
        """Give a sign of life; return False when the lease is not the owner's any more."""

    def age_s(self, owner: Owner, found: FoundLease) -> float | None:
        """Return the seconds since the last heartbeat, by the store's clock; None: not known."""

    def remove(self, owner: Owner) -> None:
        """Remove the lease, if it is the owner's."""


def open_lease_file(uri: str) -> LeaseFile:
    """Return the file of a lease at a URI; makes no request."""
    if files.is_local(uri):
        return LocalLeaseFile(Path(uri))
    if is_object_store(uri):
        return ObjectLeaseFile(uri)
    return PlainLeaseFile(uri)


def read_lease(file: LeaseFile, folder: str) -> FoundLease | None:
    """Read the lease of a folder; None where there is none.

    Raises InputError for one that may not be read, StoreError when the store fails.
    """
    try:
        return file.read()
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(
            f"{folder} holds a lease that cannot be read: {error}; give read access to"
            f" {files.LEASE}, or remove it when no process writes the folder"
        ) from error


class LocalLeaseFile:
    """A lease on a disk. Its folder is made, and removed with the lease when nothing is in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: list[Path] = []  # folders, the innermost first

    def read(self) -> FoundLease | None:
        """Read the lease; None where there is none."""
        try:
            with self._path.open("rb") as file:  # opened, a shared disk shows its newest state
                data = file.read()
                stat = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        return FoundLease(Owner.parse(data), (stat.st_ino, stat.st_mtime_ns), stat.st_mtime)

    def create(self, owner: Owner) -> bool:
        """Write the lease where there is none.

        Raises InputError for a folder that cannot be made or written to.
        """
        folder = self._path.parent
        whole = self._temporary(owner)
        try:
            self._make_folder(folder)
            whole.write_bytes(owner.to_bytes())
            _link(whole, self._path, owner)
        except FileExistsError:
            if not folder.is_dir():
                raise InputError(f"{folder} is a file; choose another folder") from None
            return False
        except OSError as error:
            self._remove_folders()
            raise InputError(
                f"cannot write to {folder}: {error.strerror or error}; make room or give write"
                " access, or choose another folder"
            ) from error
        finally:
            with suppress(OSError):
                whole.unlink(missing_ok=True)
        return True

    def replace(self, owner: Owner, found: FoundLease) -> bool:
        """Write the lease in place of the one that was found."""
        now = self.read()
        if now is None or now.version != found.version:
            return False
        files.write_bytes(str(self._path), owner.to_bytes())
        return is_kept(self, owner)

    def beat(self, owner: Owner) -> bool:
        """Set the file's time, if it is the owner's."""
        try:
            with self._path.open("r+b") as file:
                found = Owner.parse(file.read())
                if found is None or found.token != owner.token:
                    return False
                # of the file that was read: not of another that has replaced it since
                os.utime(file.fileno())
        except (FileNotFoundError, PermissionError):  # that of another user has replaced it
            return False
        return True

    def age_s(self, owner: Owner, found: FoundLease) -> float | None:
        """Return the seconds since the last heartbeat: against the time of a new file."""
        probe = self._temporary(owner)
        try:
            probe.touch()
            now = probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
        return None if found.modified is None else max(0.0, now - found.modified)

    def remove(self, owner: Owner) -> None:
        """Remove the lease, if it is the owner's, and folders that it has made in vain."""
        if is_held(self, owner):
            self._path.unlink(missing_ok=True)
        self._remove_folders()

    def _temporary(self, owner: Owner) -> Path:
        return self._path.with_name(f".{self._path.name}.{owner.token}.tmp")

    def _make_folder(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made = missing or self._made

    def _remove_folders(self) -> None:
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # something is in it
                return


class ObjectLeaseFile:
    """A lease in an object store, by conditional writes where the store has them."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._filesystem, self._path = files.filesystem_of(uri)
        self._version: Any = None  # of the object that this process has written last
        self._beats = 0
        self._plain: PlainLeaseFile | None = None  # for a store without conditions

    def read(self) -> FoundLease | None:
        """Read the lease; None where there is none."""
        try:
            data, meta = self._filesystem.cat_version(self._path)
        except FileNotFoundError:
            return None
        version = (meta["e_tag"], meta["version"], data)
        return FoundLease(Owner.parse(data), version, meta["last_modified"].timestamp())

    def create(self, owner: Owner) -> bool:
        """Write the lease where there is none."""
        try:
            found = self.read()  # a store that does not know conditions would write it over
            if found is not None:
                return found.is_of(owner)
            return self._write_first(owner, None)
        except OSError as error:
            reraise_outage(error)
            raise InputError(f"cannot write to {self._uri}: {error}") from error

    def replace(self, owner: Owner, found: FoundLease) -> bool:
        """Write the lease in place of the one that was found."""
        now = self.read()
        if now is None or now.version != found.version:
            return False
        return self._write_first(owner, _condition(now))

    def _write_first(self, owner: Owner, version: Any) -> bool:
        """Write the lease, and find out whether the store knows conditions."""
        try:
            if not self._write(owner, version):
                return self._has_own(owner)
            # a store that does not know the condition writes in any case
            if not self._write(owner, None):
                return True
        except NoConditionsError:
            self._plain = PlainLeaseFile(self._uri)
            return self._plain.write(owner)
        self._plain = PlainLeaseFile(self._uri)
        return is_kept(self, owner)

    def beat(self, owner: Owner) -> bool:
        """Write the lease anew, if it is the owner's."""
        if self._plain is not None:
            return self._plain.beat(owner)
        if self._version is not None and self._write(owner, self._version):
            return True
        if not self._has_own(owner):
            return False
        return self._write(owner, self._version) or self._has_own(owner)

    def age_s(self, owner: Owner, found: FoundLease) -> float | None:
        """Return the seconds since the last heartbeat: against the time of a new object."""
        folder, _, name = self._path.rpartition("/")
        probe = f"{folder}/.{name}.{owner.token}.tmp"  # who looks into the folder ignores it
        self._filesystem.pipe_file(probe, b"")
        try:
            now = self._filesystem.info(probe)["LastModified"].timestamp()
        finally:
            with suppress(RunError, OSError):  # it may be written, but not removed
                self._filesystem.rm_file(probe)
        return None if found.modified is None else max(0.0, now - found.modified)

    def remove(self, owner: Owner) -> None:
        """Remove the lease, if it is the owner's."""
        if is_held(self, owner):
            self._filesystem.rm_file(self._path)

    def _write(self, owner: Owner, version: Any) -> bool:
        self._beats += 1
        written = self._filesystem.pipe_if(self._path, owner.to_bytes(self._beats), version)
        if written is not None:
            self._version = written
        return written is not None

    def _has_own(self, owner: Owner) -> bool:
        """Return whether the lease is the owner's: it may be written, and only the answer lost."""
        found = self.read()
        if found is None or not found.is_of(owner):
            return False
        self._version = _condition(found)
        return True


class PlainLeaseFile:
    """A lease in a store without conditional writes."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._beats = 0

    def read(self) -> FoundLease | None:
        """Read the lease; None where there is none."""
        try:
            data = files.read_bytes(self._uri)
        except FileNotFoundError:
            return None
        return FoundLease(Owner.parse(data), data, None)

    def create(self, owner: Owner) -> bool:
        """Write the lease where there is none, or where it is the owner's."""
        found = self.read()
        if found is not None and not found.is_of(owner):
            return False
        return self.write(owner)

    def replace(self, owner: Owner, found: FoundLease) -> bool:
        """Write the lease in place of the one that was found."""
        now = self.read()
        if now is None or now.owner != found.owner:
            return False
        return self.write(owner)

    def beat(self, owner: Owner) -> bool:
        """Write the lease anew, if it is the owner's."""
        if not is_held(self, owner):
            return False
        self._write(owner)
        return True

    def age_s(self, *_: object) -> float | None:
        """Return None: such stores need not tell the time."""
        return None

    def remove(self, owner: Owner) -> None:
        """Remove the lease, if it is the owner's."""
        if is_held(self, owner):
            files.remove(self._uri)

    def write(self, owner: Owner) -> bool:
        """Write the lease; return whether it is still the owner's after a while."""
        self._write(owner)
        return is_kept(self, owner)

    def _write(self, owner: Owner) -> None:
        self._beats += 1
        files.write_bytes(self._uri, owner.to_bytes(self._beats))


def is_held(file: LeaseFile, owner: Owner) -> bool:
    """Return whether the lease is the owner's."""
    found = file.read()
    return found is not None and found.is_of(owner)


def is_kept(file: LeaseFile, owner: Owner) -> bool:
    """Return whether a lease that was just written is still the owner's after a while."""
    time.sleep(SETTLE_S)
    return is_held(file, owner)


def _condition(found: FoundLease) -> dict[str, Any]:
    """Return the version of an object as a condition of ObjectStore.write_if."""
    return {"e_tag": found.version[0], "version": found.version[1]}


def _link(whole: Path, target: Path, owner: Owner) -> None:
    """Give a file another name. Raises FileExistsError where there is a file of that name."""
    try:
        os.link(whole, target)  # readers never see a part of it
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as exFAT
        with target.open("xb") as file:
            file.write(owner.to_bytes())
