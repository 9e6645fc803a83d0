"""Publish, open and remove the versions of a gallery.

A version `v=0001` holds tiles/, index/ and the embeddings of the tiles that it brought; embeddings
of older tiles stay in the version that brought them. Images lie beside the versions, in images/.
All that a writer writes has a name of its own: one that lost its lease overwrites nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from s4g_ray.errors import RunError
from s4g_ray.gallery.store.header import IMAGES
from s4g_ray.gallery.store.index_facts import IndexFacts
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
SEGMENT = r"v=\d{4,}/embeddings/[0-9a-z-]+"  # of an embedding table


@dataclass(frozen=True)
class Version:
    """A published version: its parts of tiles, and what it needs of older versions."""

    gallery: str
    number: int
    parts: tuple[Part, ...]
    stamp: Stamp
    # by the number of the version that brought them: the folders, in the gallery, of its embeddings
    segments: Mapping[int, str]
    images: tuple[str, ...]  # the files of images/ that it needs
    index: str  # its folder within that of the version
    facts: IndexFacts
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
    segments: Mapping[int, str],
    images: Sequence[str],
    index: str,
    facts: IndexFacts,
    info: Mapping[str, Any],
) -> None:
    """Publish a version whose files are all written."""
    own = {
        **info,
        "segments": {str(key): folder for key, folder in segments.items()},
        "images": list(images),
        "index": index,
        "index_facts": facts.as_dict(),
    }
    publish(version_folder(gallery, number), KIND, parts, stamp, own)


def open_version(gallery: str, number: int) -> Version:
    """Read the manifest of a version. Raises RunError when it is missing or damaged."""
    folder = version_folder(gallery, number)
    manifest = open_published(folder, KIND)
    info = manifest.info
    is_whole = {"segments", "images", "index"} <= set(info) and isinstance(info["segments"], dict)
    if manifest.stamp is None or not is_whole:
        raise RunError(f"{folder}: its manifest lacks entries; build the gallery again")
    if not all(re.fullmatch(SEGMENT, path) for path in dict(info["segments"]).values()):
        raise RunError(f"{folder}: its manifest names other folders; build the gallery again")
    return Version(
        gallery=gallery,
        number=number,
        parts=manifest.parts,
        stamp=manifest.stamp,
        segments={int(key): str(path) for key, path in info["segments"].items()},
        images=tuple(info["images"]),
        index=str(info["index"]),
        facts=IndexFacts.from_info(folder, info),
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
    tables = {path for version in kept for path in version.segments.values()}
    for number in list_versions(gallery, KEY):
        name = f"{KEY}={number:04d}"
        folder = files.join(gallery, name)
        own = {path.removeprefix(f"{name}/") for path in tables if path.startswith(f"{name}/")}
        _keep_only(folder, EMBEDDINGS, own)
        if number in {version.number for version in kept}:
            continue
        if not own:
            files.remove(folder)
            continue
        for entry in files.list_names(folder):
            if entry != EMBEDDINGS:
                files.remove(files.join(folder, entry))
    _keep_only(gallery, IMAGES, {name for version in kept for name in version.images})
    for version in kept:
        _keep_only(version.folder, INDEX, {version.index})
        _keep_only(version.folder, TILES, {part.name for part in version.parts})


def _keep_only(folder: str, name: str, wanted: Set[str]) -> None:
    """Remove what interrupted writers left in a folder of a folder; wanted: paths in the latter."""
    for entry in files.list_names(files.join(folder, name)):
        if f"{name}/{entry}" not in wanted:
            files.remove(files.join(folder, name, entry))
