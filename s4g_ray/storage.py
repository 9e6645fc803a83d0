"""Local paths and s3:// URIs through fsspec: whole-object writes, byte-range reads, atomically published folders.

A published folder is its files plus `_MANIFEST.json`, written last; a reader ignores a folder without one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from s4g_ray.errors import InputError, RunError, WriteError
from s4g_ray.object_store import is_object_store

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
        from s4g_ray.s3_filesystem import s3_filesystem  # takes a second to import

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
    return of_length(read_there(uri, offset or 0, length), uri, offset, length)


def read_there(uri: str, start: int, length: int | None) -> bytes:
    """What is there of a range; less than `length` where the object ends before. Raises OSError."""
    if not is_local(uri):
        filesystem, path = filesystem_of(uri)
        return bytes(filesystem.cat_file(path, start=start, end=None if length is None else start + length))
    with Path(uri).open("rb") as file:
        there = os.fstat(file.fileno()).st_size - start  # or a wrong length would want its memory first
        file.seek(start)
        return file.read(-1 if length is None else max(0, min(length, there)))


def of_length(data: bytes, uri: str, offset: int | None, length: int | None) -> bytes:
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


@dataclass(frozen=True)
class Stamp:
    """What an artefact was made from: consumers refuse one that does not fit."""

    step: int  # optimiser steps of the model
    weights_sha256: str
    preprocessing: str  # hash of sizes and normalisation
    dataset: str  # fingerprint of the data set
    dim: int  # D of the embeddings
    dtype: str

    def require(self, other: Stamp, what: str) -> None:
        """Raises RunError that names both values when `other` was made from something else."""
        for name, value in asdict(self).items():
            found = getattr(other, name)
            if value != found:
                raise RunError(f"{what}: made with {name} {found!r}, but {value!r} is wanted; remove it and resume")


@dataclass(frozen=True)
class Part:
    """A file of a published folder."""

    name: str
    rows: int
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raises RunError for a name by which a file outside the folder would be read, or none."""
        steps = self.name.split("/")
        if "://" in self.name or "\0" in self.name or any(step in ("", ".", "..") for step in steps):
            raise RunError(
                f"a published folder names a file outside itself, or none: {self.name!r}; it was altered, remove it"
            )


@dataclass(frozen=True)
class Manifest:
    """What a published folder holds."""

    kind: str
    parts: tuple[Part, ...]
    stamp: Stamp | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Part | None:
        """The file of that name, if the folder has one."""
        return next((part for part in self.parts if part.name == name), None)


def write_part(folder: str, name: str, data: bytes, rows: int) -> Part:
    """Write a file of a folder that is to be published."""
    write_bytes(join(folder, name), data)
    return Part(name, rows, len(data), fingerprint(data))


def publish(
    folder: str,
    kind: str,
    parts: Sequence[Part],
    stamp: Stamp | None = None,
    info: Mapping[str, Any] | None = None,
) -> Manifest:
    """Make a folder visible to readers: its manifest is written, last."""
    manifest = Manifest(kind, tuple(parts), stamp, dict(info or {}))
    write_json(join(folder, MANIFEST), {"format": "s4g-manifest", "version": 1, **asdict(manifest)})
    return manifest


def is_published(folder: str) -> bool:
    """Whether a folder has its manifest."""
    filesystem, path = filesystem_of(join(folder, MANIFEST))
    filesystem.invalidate_cache()
    return bool(filesystem.isfile(path))


def open_published(folder: str, kind: str, stamp: Stamp | None = None) -> Manifest:
    """Read the manifest of a folder. Raises RunError when there is none, or it is of another kind or stamp."""
    try:
        value = read_json(join(folder, MANIFEST))
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no published {kind}: {MANIFEST} is missing") from error
    if not isinstance(value, dict) or value.get("kind") != kind:
        raise RunError(f"{folder} holds {value.get('kind') if isinstance(value, dict) else value!r}, not {kind!r}")
    try:
        found = Stamp(**value["stamp"]) if value["stamp"] else None
        manifest = Manifest(kind, tuple(Part(**part) for part in value["parts"]), found, value["info"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{join(folder, MANIFEST)} is no manifest ({error!r}); remove {folder} and resume") from error
    except RunError as error:
        raise RunError(f"{join(folder, MANIFEST)}: {error}") from error
    if not isinstance(manifest.info, dict):
        raise RunError(f"{join(folder, MANIFEST)} is no manifest (info={manifest.info!r}); remove {folder} and resume")
    if stamp is not None and found is not None:
        stamp.require(found, folder)
    return manifest


def read_part(folder: str, part: Part) -> bytes:
    """Read a file of a published folder. Raises RunError when it is missing or not what was published."""
    try:
        data = read_bytes(join(folder, part.name))
    except FileNotFoundError as error:
        raise _missing(folder, part) from error
    if len(data) != part.num_bytes or fingerprint(data) != part.sha256:
        raise altered(folder, part)
    return data


def open_part(folder: str, part: Part) -> Any:
    """Open a file of a published folder, to read a piece of it.

    Raises RunError when it is missing or of another length; what was altered in place is seen by read_part alone.
    """
    filesystem, path = filesystem_of(join(folder, part.name))
    try:
        file = filesystem.open(path, "rb")
        size = file.seek(0, io.SEEK_END)  # of a remote file: the request that opening it made has told
        file.seek(0)
    except FileNotFoundError as error:
        raise _missing(folder, part) from error
    if size != part.num_bytes:
        file.close()
        raise altered(folder, part)
    return file


def altered(folder: str, part: Part) -> RunError:
    """The error of a file that is not what was published."""
    uri = join(folder, part.name)
    return RunError(f"{uri} is not what was published: cut short or altered; remove {folder} and resume")


def _missing(folder: str, part: Part) -> RunError:
    uri = join(folder, part.name)
    return RunError(f"{uri} is in the manifest but missing; remove {folder} and resume")


def list_versions(folder: str, key: str) -> list[int]:
    """N of the sub-folders `key=N` of a folder, published or not, rising."""
    pattern = re.compile(re.escape(key) + r"=(\d+)$")
    return sorted(int(match[1]) for name in list_names(folder) if (match := pattern.match(name)))


def published_versions(folder: str, key: str) -> list[int]:
    """N of the published sub-folders `key=N` of a folder, rising."""
    return [v for v in list_versions(folder, key) if is_published(join(folder, f"{key}={v:04d}"))]


def latest_version(folder: str, key: str, at_most: int | None = None) -> int | None:
    """The highest N among the published sub-folders `key=N` of a folder."""
    for version in reversed(list_versions(folder, key)):
        if (at_most is None or version <= at_most) and is_published(join(folder, f"{key}={version:04d}")):
            return version
    return None
