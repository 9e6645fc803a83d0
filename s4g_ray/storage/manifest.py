"""Published folders: parts, checksums, stamps, versions."""

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
                raise RunError(
                    f"{what}: made with {name} {found!r}, but {value!r} is wanted; remove it and resume"
                )


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
        if (
            "://" in self.name
            or "\0" in self.name
            or any(step in ("", ".", "..") for step in steps)
        ):
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
        raise RunError(
            f"{folder} holds {value.get('kind') if isinstance(value, dict) else value!r}, not {kind!r}"
        )
    try:
        found = Stamp(**value["stamp"]) if value["stamp"] else None
        manifest = Manifest(
            kind, tuple(Part(**part) for part in value["parts"]), found, value["info"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{join(folder, MANIFEST)} is no manifest ({error!r}); remove {folder} and resume"
        ) from error
    except RunError as error:
        raise RunError(f"{join(folder, MANIFEST)}: {error}") from error
    if not isinstance(manifest.info, dict):
        raise RunError(
            f"{join(folder, MANIFEST)} is no manifest (info={manifest.info!r}); remove {folder} and resume"
        )
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
        size = file.seek(
            0, io.SEEK_END
        )  # of a remote file: the request that opening it made has told
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
    return RunError(
        f"{uri} is not what was published: cut short or altered; remove {folder} and resume"
    )


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
        if (at_most is None or version <= at_most) and is_published(
            join(folder, f"{key}={version:04d}")
        ):
            return version
    return None
