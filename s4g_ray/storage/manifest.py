"""Publish folders, and read published ones: parts, checksums, stamps, versions.

A folder is published by its manifest, `_MANIFEST.json`, which is written last. It lists the parts
with rows, bytes and sha256, and carries a Stamp that names the inputs of the folder.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from s4g_ray.errors import RunError
from s4g_ray.storage.files import (
    MANIFEST,
    filesystem_of,
    fingerprint,
    join,
    list_names,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)


@dataclass(frozen=True)
class Stamp:
    """The inputs that an artefact was made from. Consumers refuse an artefact of other inputs."""

    step: int  # optimiser steps of the model
    weights_sha256: str
    preprocessing: str  # hash of sizes and normalisation
    dataset: str  # fingerprint of the data set
    dim: int  # D of the embeddings
    dtype: str

    def require(self, other: Stamp, what: str) -> None:
        """Raise RunError with both values when `other` was made from other inputs."""
        for name, value in asdict(self).items():
            found = getattr(other, name)
            if value != found:
                raise RunError(
                    f"{what}: made with {name} {found!r}, but {value!r} is wanted;"
                    " remove it and resume"
                )


@dataclass(frozen=True)
class Part:
    """A file of a published folder."""

    name: str
    rows: int
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raise RunError for a name that leads out of the folder, or that is no file's name."""
        has_bad_step = any(step in ("", ".", "..") for step in self.name.split("/"))
        if "://" in self.name or "\0" in self.name or has_bad_step:
            raise RunError(
                f"a published folder names a file outside itself, or no file: {self.name!r};"
                " it was altered, remove it"
            )


@dataclass(frozen=True)
class Manifest:
    """The contents of a published folder."""

    kind: str
    parts: tuple[Part, ...]
    stamp: Stamp | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Part | None:
        """Return the part of that name, if the folder has one."""
        return next((part for part in self.parts if part.name == name), None)


def write_part(folder: str, name: str, data: bytes, rows: int) -> Part:
    """Write a file of a folder that is published later."""
    write_bytes(join(folder, name), data)
    return Part(name, rows, len(data), fingerprint(data))


def publish(
    folder: str,
    kind: str,
    parts: Sequence[Part],
    stamp: Stamp | None = None,
    info: Mapping[str, Any] | None = None,
) -> Manifest:
    """Make a folder visible to readers: write its manifest, after all parts."""
    manifest = Manifest(kind, tuple(parts), stamp, dict(info or {}))
    write_json(join(folder, MANIFEST), {"format": "s4g-manifest", "version": 1, **asdict(manifest)})
    return manifest


def is_published(folder: str) -> bool:
    """Return whether a folder has a manifest."""
    filesystem, path = filesystem_of(join(folder, MANIFEST))
    filesystem.invalidate_cache()
    return bool(filesystem.isfile(path))


def open_published(folder: str, kind: str, stamp: Stamp | None = None) -> Manifest:
    """Read the manifest of a folder.

    Raises RunError when there is none, or when it has another kind or another stamp.
    """
    try:
        value = read_json(join(folder, MANIFEST))
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no published {kind}: {MANIFEST} is missing") from error
    if not isinstance(value, dict):
        raise RunError(f"{folder} holds {value!r}, not {kind!r}")
    if value.get("kind") != kind:
        raise RunError(f"{folder} holds {value.get('kind')!r}, not {kind!r}")
    manifest = _parse_manifest(folder, kind, value)
    if stamp is not None and manifest.stamp is not None:
        stamp.require(manifest.stamp, folder)
    return manifest


def _parse_manifest(folder: str, kind: str, value: Mapping[str, Any]) -> Manifest:
    uri = join(folder, MANIFEST)
    try:
        stamp = Stamp(**value["stamp"]) if value["stamp"] else None
        parts = tuple(Part(**part) for part in value["parts"])
        info = value["info"]
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{uri} is not a manifest ({error!r}); remove {folder} and resume"
        ) from error
    except RunError as error:
        raise RunError(f"{uri}: {error}") from error
    if not isinstance(info, dict):
        raise RunError(f"{uri} is not a manifest (info={info!r}); remove {folder} and resume")
    return Manifest(kind, parts, stamp, info)


def read_part(folder: str, part: Part) -> bytes:
    """Read a file of a published folder.

    Raises RunError when it is missing, or differs from the published one in size or checksum.
    """
    try:
        data = read_bytes(join(folder, part.name))
    except FileNotFoundError as error:
        raise _missing(folder, part) from error
    if len(data) != part.num_bytes or fingerprint(data) != part.sha256:
        raise altered(folder, part)
    return data


def open_part(folder: str, part: Part) -> Any:
    """Open a file of a published folder, to read pieces of it.

    Raises RunError when it is missing or has another length. Does not check the checksum: only
    read_part finds a file that was altered in place.
    """
    filesystem, path = filesystem_of(join(folder, part.name))
    try:
        file = filesystem.open(path, "rb")
        size = file.seek(0, io.SEEK_END)  # a remote file knows its size since it was opened
        file.seek(0)
    except FileNotFoundError as error:
        raise _missing(folder, part) from error
    if size != part.num_bytes:
        file.close()
        raise altered(folder, part)
    return file


def altered(folder: str, part: Part) -> RunError:
    """Return the error of a file that differs from the published one."""
    uri = join(folder, part.name)
    return RunError(
        f"{uri} differs from the published file: cut short or altered; remove {folder} and resume"
    )


def _missing(folder: str, part: Part) -> RunError:
    uri = join(folder, part.name)
    return RunError(f"{uri} is in the manifest but missing; remove {folder} and resume")


def list_versions(folder: str, key: str) -> list[int]:
    """Return N of the sub-folders `key=N` of a folder, published or not, ascending."""
    pattern = re.compile(re.escape(key) + r"=(\d+)$")
    matches = [pattern.match(name) for name in list_names(folder)]
    return sorted(int(match[1]) for match in matches if match)


def published_versions(folder: str, key: str) -> list[int]:
    """Return N of the published sub-folders `key=N` of a folder, ascending."""
    return [
        version
        for version in list_versions(folder, key)
        if is_published(join(folder, f"{key}={version:04d}"))
    ]


def latest_version(folder: str, key: str, at_most: int | None = None) -> int | None:
    """Return the highest N of the published sub-folders `key=N` of a folder, up to `at_most`.

    Returns None when there is none.
    """
    for version in reversed(list_versions(folder, key)):
        if at_most is not None and version > at_most:
            continue
        if is_published(join(folder, f"{key}={version:04d}")):
            return version
    return None
