"""Publish, open and remove the versions of a gallery.

A version `v=0001` holds tiles/, index/ and the embeddings of the tiles that it brought; embeddings
of older tiles stay in the version that brought them. Images lie beside the versions, in images/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from s4g_ray.errors import RunError
from s4g_ray.gallery.store.header import IMAGES
from s4g_ray.gallery.store.tiles import FOLDER as TILES
from s4g_ray.storage import files
from s4g_ray.storage.manifest import (
    Part,
    Stamp,
    is_published,
    list_versions,
    open_published,
    publish,
)

KIND = "gallery-version"
KEEP = 2  # versions that answer: the current one and the one before
EMBEDDINGS = "embeddings"
INDEX = "index"
KEY = "v"


@dataclass(frozen=True)
class Version:
    """A published version: its parts of tiles, and what it needs of older versions."""

    gallery: str
    number: int
    parts: tuple[Part, ...]
    stamp: Stamp
    segments: tuple[int, ...]  # the versions whose embeddings it needs
    images: tuple[str, ...]  # the files of images/ that it needs
    index: str  # its folder within that of the version
    info: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Return the folder of the version."""
        return version_folder(self.gallery, self.number)

    @property
    def index_folder(self) -> str:
        """Return the folder of the index."""
        return files.join(self.folder, self.index)


def version_folder(gallery: str, number: int) -> str:
    """Return the folder of a version."""
    return files.join(gallery, f"{KEY}={number:04d}")


def publish_version(
    gallery: str,
    number: int,
    parts: Sequence[Part],
    stamp: Stamp,
    segments: Sequence[int],
    images: Sequence[str],
    index: str,
    info: Mapping[str, Any],
) -> None:
    """Publish a version whose files are all written."""
    own = {**info, "segments": list(segments), "images": list(images), "index": index}
    publish(version_folder(gallery, number), KIND, parts, stamp, own)


def open_version(gallery: str, number: int) -> Version:
    """Read the manifest of a version. Raises RunError when it is missing or damaged."""
    folder = version_folder(gallery, number)
    manifest = open_published(folder, KIND)
    info = manifest.info
    if manifest.stamp is None or not {"segments", "images", "index"} <= set(info):
        raise RunError(f"{folder}: its manifest lacks entries; build the gallery again")
    return Version(
        gallery=gallery,
        number=number,
        parts=manifest.parts,
        stamp=manifest.stamp,
        segments=tuple(info["segments"]),
        images=tuple(info["images"]),
        index=str(info["index"]),
        info=info,
    )


def prune_versions(gallery: str, current: int) -> None:
    """Remove what neither the current version nor the one before needs.

    Embeddings and images of removed versions stay while a kept version needs them.
    """
    published = [
        number
        for number in list_versions(gallery, KEY)
        if number <= current and is_published(version_folder(gallery, number))
    ]
    kept = [open_version(gallery, number) for number in published[-KEEP:]]
    segments = {number for version in kept for number in version.segments}
    for number in list_versions(gallery, KEY):
        folder = version_folder(gallery, number)
        if number in {version.number for version in kept}:
            continue
        if number not in segments:
            files.remove(folder)
            continue
        for name in files.list_names(folder):
            if name != EMBEDDINGS:
                files.remove(files.join(folder, name))
    _keep_only(gallery, IMAGES, {name for version in kept for name in version.images})
    for version in kept:
        _keep_only(version.folder, INDEX, {version.index})
        _keep_only(version.folder, TILES, {part.name for part in version.parts})


def _keep_only(folder: str, name: str, wanted: Set[str]) -> None:
    """Remove what interrupted writers left in a folder of a folder; wanted: paths in the latter."""
    for entry in files.list_names(files.join(folder, name)):
        if f"{name}/{entry}" not in wanted:
            files.remove(files.join(folder, name, entry))
