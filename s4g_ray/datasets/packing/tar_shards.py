"""Write objects of any length, and read tar files back to verify them."""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from s4g_ray.errors import RunError, WriteError
from s4g_ray.storage import files
from s4g_ray.storage.tar_writer import Member

READ_BACK = 2**24  # bytes, at a time
REMEDY = "check the store, then run the same command again"


@contextmanager
def new_object(uri: str) -> Iterator[IO[bytes]]:
    """Open a file to write, of any length. It appears at `uri` as a whole when the block ends.

    A local file is written beside its target; for an object store the file is written in the folder
    for temporary files, then sent in parts. Raises WriteError for a store that is full or refuses
    access; the block must raise no other OSError.
    """
    try:
        if files.is_local(uri):
            yield from _write_beside(Path(uri))
        else:
            yield from _write_and_send(uri)
    except RunError:  # a StoreError names bucket and key
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise WriteError(
            f"cannot write {uri}: {reason}; make room (in {tempfile.gettempdir()} too, for an"
            " object store) or give access, then run the same command again"
        ) from error


def _write_beside(target: Path) -> Iterator[IO[bytes]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_and_send(uri: str) -> Iterator[IO[bytes]]:
    with tempfile.NamedTemporaryFile(prefix="s4g-shard-") as file:
        yield file
        file.flush()
        filesystem, path = files.filesystem_of(uri)
        filesystem.put_file(file.name, path)


def verify(uri: str, num_bytes: int, sha256: str, members: Sequence[Member]) -> None:
    """Read a tar file back. Raises RunError when it, or a member at its offset, has changed."""
    whole = hashlib.sha256()
    start = 0
    for batch in [*_batch_members(members), []]:  # the last, empty batch reads the end of the file
        end = batch[-1].offset + batch[-1].length if batch else num_bytes
        try:
            data = files.read_bytes(uri, start, end - start)
        except (FileNotFoundError, EOFError) as error:
            raise RunError(f"{uri} is shorter than what was written; {REMEDY}") from error
        whole.update(data)
        for member in batch:
            first = member.offset - start
            if hashlib.sha256(data[first : first + member.length]).hexdigest() != member.sha256:
                raise RunError(
                    f"{uri}: {member.name} at byte {member.offset} is not what was written;"
                    f" {REMEDY}"
                )
        start = end
    if whole.hexdigest() != sha256:
        raise RunError(f"{uri} is not what was written; {REMEDY}")


def _batch_members(members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Yield consecutive members in batches of about READ_BACK bytes."""
    first = 0
    for number, member in enumerate(members, 1):
        num_bytes = member.offset + member.length - members[first].offset
        if number == len(members) or num_bytes >= READ_BACK:
            yield members[first:number]
            first = number
