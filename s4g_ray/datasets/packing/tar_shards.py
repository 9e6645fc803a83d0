"""Uncompressed tar files of images: written so that equal members make equal bytes, and read back to be verified."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from s4g_ray.errors import RunError, WriteError
from s4g_ray.storage import files

READ_BACK = 2**24  # bytes, at a time
REMEDY = "check the store, then run the same command again"


@dataclass(frozen=True)
class Member:
    """A file within a tar file."""

    name: str
    offset: int  # bytes, of its data
    length: int
    sha256: str


class TarWriter:
    """Adds members to a tar file (POSIX ustar): files that anyone may read, without owner or time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.num_bytes, self.members = 0, list[Member]()

    def add(self, name: str, data: bytes) -> Member:
        """Write a member. Raises ValueError for a name that leads out of the folder that it is extracted to."""
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} is no name of a tar member: it leads out of the folder")
        header = tarfile.TarInfo(name)
        header.size = len(data)  # of mode 644, at time 0
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        member = Member(name, self.num_bytes, len(data), hashlib.sha256(data).hexdigest())
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        self.members.append(member)
        return member

    def close(self) -> str:
        """Write the end; the sha256 of the whole."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


@contextmanager
def new_object(uri: str) -> Iterator[IO[bytes]]:
    """A file to write, of any length, which is at `uri` as a whole when the block ends, and not at all before.

    Beside it on this machine; for an object store in the folder for temporary files, then sent in parts. Raises
    WriteError for a store that is full or refuses; the block must raise no other OSError.
    """
    try:
        if files.is_local(uri):
            yield from _beside(Path(uri))
        else:
            yield from _sent(uri)
    except RunError:  # a StoreError names bucket and key
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise WriteError(
            f"cannot write {uri}: {reason}; make room (in {tempfile.gettempdir()} too, for an object store) or give"
            " access, then run the same command again"
        ) from error


def _beside(target: Path) -> Iterator[IO[bytes]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _sent(uri: str) -> Iterator[IO[bytes]]:
    with tempfile.NamedTemporaryFile(prefix="s4g-shard-") as file:
        yield file
        file.flush()
        filesystem, path = files.filesystem_of(uri)
        filesystem.put_file(file.name, path)


def verify(uri: str, num_bytes: int, sha256: str, members: Sequence[Member]) -> None:
    """Read a tar file back. Raises RunError when it, or a member at its offset, is not what was written."""
    whole, start = hashlib.sha256(), 0
    for some in [*_groups(members), []]:
        end = some[-1].offset + some[-1].length if some else num_bytes
        try:
            data = files.read_bytes(uri, start, end - start)
        except (FileNotFoundError, EOFError) as error:
            raise RunError(f"{uri} is shorter than what was written; {REMEDY}") from error
        whole.update(data)
        for member in some:
            first = member.offset - start
            if hashlib.sha256(data[first : first + member.length]).hexdigest() != member.sha256:
                raise RunError(
                    f"{uri}: {member.name} at byte {member.offset} is not what was written; {REMEDY}"
                )
        start = end
    if whole.hexdigest() != sha256:
        raise RunError(f"{uri} is not what was written; {REMEDY}")


def _groups(members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Members that follow each other, those of about READ_BACK bytes together."""
    first = 0
    for number, member in enumerate(members, 1):
        if (
            number == len(members)
            or member.offset + member.length - members[first].offset >= READ_BACK
        ):
            yield members[first:number]
            first = number
