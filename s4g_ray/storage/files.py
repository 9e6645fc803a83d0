"""Local paths and s3:// URIs through fsspec: whole-object writes, byte-range reads, atomically published folders.

A published folder is its files plus `_MANIFEST.json`, written last; a reader ignores a folder without one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import fsspec

from s4g_ray.errors import InputError, RunError, WriteError
from s4g_ray.storage.s3_settings import is_object_store

MANIFEST = "_MANIFEST.json"
PACKAGE_SCHEME = "package://"


def is_local(uri: str) -> bool:
    """Whether a URI is a path of this machine."""
    return "://" not in uri


def join(uri: str, *parts: str) -> str:
    """Join below a folder; an absolute or s3:// last part wins."""
    for part in parts:
        uri = part if part.startswith("/") or "://" in part else f"{uri.rstrip('/')}/{part}"
    return uri


def absolute(uri: str) -> str:
    """A local path (or file:// URI) made absolute (workers run in other folders); s3:// URIs as they are.

    Raises InputError for an empty path and for s3:// without a bucket, which unset variables leave.
    """
    uri = uri.removeprefix("file://")
    if not uri or re.fullmatch(r"s3a?://*", uri):
        raise InputError(f"{uri!r} names no {'bucket' if uri else 'path'}; is a variable unset?")
    return str(Path(uri).expanduser().absolute()) if is_local(uri) else uri


def resolve_package(uri: str) -> str:
    """`package://PACKAGE/FILE` -> the path of a file that an installed Python package ships.

    Raises InputError when the package or the file is not there.
    """
    if not uri.startswith(PACKAGE_SCHEME):
        return uri
    package, _, name = uri.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):  # a parent package is missing; not a module's name
        spec = None
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / name).is_file():
            return str(Path(folder) / name)
    raise InputError(f"{uri}: no installed Python package {package!r} ships {name!r}")


def filesystem_of(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path there; a local path is taken as it is, whatever signs it holds."""
    if is_local(uri):
        return fsspec.filesystem("file"), uri
    if is_object_store(uri):
        from s4g_ray.storage.s3_filesystem import s3_filesystem  # takes a second to import

        return s3_filesystem(), uri.partition("://")[2].rstrip("/")
    filesystem, path = fsspec.url_to_fs(uri)
    return filesystem, path


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = filesystem_of(uri)
    filesystem.invalidate_cache()  # other processes publish too
    return bool(filesystem.exists(path))


def list_names(uri: str) -> list[str]:
    """Sorted names of what lies directly in a folder; empty when there is no such folder."""
    filesystem, path = filesystem_of(uri)
    filesystem.invalidate_cache()
    try:
        found = [name.rstrip("/") for name in filesystem.ls(path, detail=False)]
        # an object store may hold an empty object named as the folder: it is not in the folder
        return sorted(name.rsplit("/", 1)[-1] for name in found if name != path.rstrip("/"))
    except FileNotFoundError:
        return []


def remove(uri: str) -> None:
    """Remove a file or a folder and all that is in it; nothing when it is not there.

    A published folder loses its manifest first: what is removed by half is not taken for whole. Raises WriteError for
    a store that refuses.
    """
    filesystem, path = filesystem_of(uri)
    try:
        if filesystem.isfile(f"{path}/{MANIFEST}"):
            filesystem.rm_file(f"{path}/{MANIFEST}")
        if is_object_store(uri) or filesystem.exists(path):
            filesystem.rm(path, recursive=True)
    except OSError as error:
        raise WriteError(f"cannot remove {uri}: {_reason(uri, error)}; give access") from error


def read_bytes(uri: str, offset: int | None = None, length: int | None = None) -> bytes:
    """A whole object, or `length` bytes from `offset`.

    Raises OSError (FileNotFoundError among them), and EOFError when the range ends past the object.
    """
    return check_length(read_available(uri, offset or 0, length), uri, offset, length)


def read_available(uri: str, start: int, length: int | None) -> bytes:
    """What is there of a range; less than `length` where the object ends before. Raises OSError."""
    if not is_local(uri):
        filesystem, path = filesystem_of(uri)
        return bytes(
            filesystem.cat_file(path, start=start, end=None if length is None else start + length)
        )
    with Path(uri).open("rb") as file:
        there = (
            os.fstat(file.fileno()).st_size - start
        )  # or a wrong length would want its memory first
        file.seek(start)
        return file.read(-1 if length is None else max(0, min(length, there)))


def check_length(data: bytes, uri: str, offset: int | None, length: int | None) -> bytes:
    """The data of a range. Raises EOFError when it is not `length` bytes."""
    if length is not None and len(data) != length:
        raise EOFError(f"{uri}: {length} bytes wanted from offset {offset or 0}, {len(data)} there")
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object, so that a reader sees the old one or the new one and never a part.

    Raises WriteError for a store that is full or refuses.
    """
    try:
        _write_whole(uri, data)
    except OSError as error:
        raise _refused(uri, data, error) from error


def _refused(uri: str, data: bytes, error: OSError) -> WriteError:
    return WriteError(
        f"cannot write {uri} ({len(data)} bytes): {_reason(uri, error)}; what was published stays readable: make room,"
        " or give access"
    )


def _reason(uri: str, error: OSError) -> str:
    """What went wrong with a URI, without the URI."""
    return (error.strerror or str(error) or type(error).__name__).removeprefix(f"{uri}: ")


def _write_whole(uri: str, data: bytes) -> None:
    if is_local(uri):
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    else:
        filesystem, path = filesystem_of(uri)
        filesystem.pipe_file(path, data)


def append_bytes(path: str, data: bytes) -> None:
    """Add to the end of a local file; a writer that dies leaves a part at most. Raises WriteError as write_bytes."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab") as file:
            file.write(data)
    except OSError as error:
        raise _refused(path, data, error) from error


def write_json(uri: str, value: Any) -> None:
    """Write a JSON document as a whole object. Raises ValueError for NaN and infinities."""
    write_bytes(uri, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(uri: str) -> Any:
    """Read a JSON document. Raises FileNotFoundError, and RunError when it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{uri} is not valid JSON ({error}); it was cut short or altered") from error


def fingerprint(*chunks: bytes) -> str:
    """The sha256 of byte strings, in hex."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
