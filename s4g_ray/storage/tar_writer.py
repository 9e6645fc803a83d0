"""Write uncompressed tar files of images. Equal members make equal bytes."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True)
class Member:
    """A file within a tar file."""

    name: str
    offset: int  # bytes, of its data
    length: int  # bytes
    sha256: str


class TarWriter:
    """Adds members to a tar file (POSIX ustar): readable by anyone, without owner or time."""

    def __init__(self, file: IO[bytes]) -> None:
        self.num_bytes = 0
        self.members: list[Member] = []
        self._file = file
        self._digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> Member:
        """Write a member. Raises ValueError for a name outside the folder it is extracted to."""
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} is not a name of a tar member: it leads out of the folder")
        header = tarfile.TarInfo(name)  # mode 644, at time 0
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        member = Member(name, self.num_bytes, len(data), hashlib.sha256(data).hexdigest())
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        self.members.append(member)
        return member

    def close(self) -> str:
        """Write the end, and return the sha256 of the whole file."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)
