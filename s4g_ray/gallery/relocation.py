"""Give the folder of a gallery's images anew, after they were moved."""

from __future__ import annotations

from dataclasses import dataclass, replace

from s4g_ray.data.format.image_paths import relate
from s4g_ray.data.format.moved_images import check_images_root
from s4g_ray.errors import InputError
from s4g_ray.gallery.store.header import GalleryHeader
from s4g_ray.gallery.store.tiles import read_tiles
from s4g_ray.gallery.store.versions import open_version
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
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

    Looks for a sample of the images first. steal: as build_gallery. Raises InputError for what is
    no gallery, one that holds copies of its images or has absolute paths only, where images of the
    sample are not below `root`, and for a gallery that is being written.
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
        paths = read_tiles(version.folder, version.parts, ("uri",))["uri"]
        remedy = f"`s4g gallery add {gallery} DATASET`, with its data set as it is now, renews them"
        relative = check_images_root(gallery, root, paths, remedy=remedy)
        lease.check()
        replace(header, images_root=relate(gallery, root)).save(gallery)
    return Relocated(gallery, header.name, root, relative, len(paths) - relative)
