"""Give the folder of a gallery's images anew, after they were moved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import pyarrow as pa

from s4g_ray.data.format.image_paths import relate, resolve
from s4g_ray.data.format.moved_images import check_images_root, choose_sample
from s4g_ray.errors import InputError, StoreError
from s4g_ray.gallery.store.header import GalleryHeader
from s4g_ray.gallery.store.tiles import DIGEST_BYTES, read_tiles
from s4g_ray.gallery.store.versions import open_version
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import read_ranges
from s4g_ray.storage.ownership.lease import owning


@dataclass(frozen=True)
class Relocated:
    """A gallery whose images have another folder."""

    uri: str
    name: str
    images_root: str  # absolute
    relative: int  # tiles whose paths start from the folder
    absolute: int  # tiles whose paths do not


def relocate(
    gallery: str, root: str, *, steal: bool = False, reporter: Reporter | None = None
) -> Relocated:
    """Write the folder of the images into gallery.json; tiles, embeddings and index stay.

    Compares a sample of the images with their digests first. steal: as build_gallery. Raises
    InputError for what is no gallery, one that holds copies of its images or has absolute paths
    only, where images of the sample are not below `root` or are others, and for a gallery that is
    being written.
    """
    gallery = files.absolute(gallery)
    root = files.absolute(root)
    GalleryHeader.load(gallery)  # its error comes before a lease is written
    with owning(gallery, reporter, steal=steal) as lease:
        header = GalleryHeader.load(gallery)
        if header.copies_images:
            raise InputError(
                f"{gallery} holds copies of its images: it moves as a folder, and none is elsewhere"
            )
        version = open_version(gallery, header.current)
        tiles = read_tiles(version.folder, version.parts, ("uri", "offset", "length", "digest"))
        paths = tiles["uri"]
        remedy = f"`s4g gallery add {gallery} DATASET`, with its data set as it is now, renews them"
        relative = check_images_root(gallery, root, paths, remedy=remedy)
        _check_bytes(gallery, root, tiles.take(pa.array(choose_sample(paths))))
        lease.check()
        replace(header, images_root=relate(gallery, root)).save(gallery)
    return Relocated(gallery, header.name, root, relative, len(paths) - relative)


def _check_bytes(gallery: str, root: str, sample: pa.Table) -> None:
    """Raise InputError where an image of a sample of tiles is not the one that was embedded."""
    uris = [resolve(root, path) for path in sample["uri"].to_pylist()]
    places = zip(uris, sample["offset"].to_pylist(), sample["length"].to_pylist(), strict=True)
    contents = read_ranges(list(places))
    for uri, data, digest in zip(uris, contents, sample["digest"].to_pylist(), strict=True):
        if isinstance(data, StoreError):
            raise data
        if isinstance(data, Exception):
            raise InputError(f"{uri} cannot be read: {data}") from data
        if hashlib.sha256(data).digest()[:DIGEST_BYTES] != digest:
            raise InputError(
                f"{uri} is not the image of that name that {gallery} was made from; for other"
                f" images, `s4g gallery add {gallery} DATASET` replaces the tiles that differ"
            )
