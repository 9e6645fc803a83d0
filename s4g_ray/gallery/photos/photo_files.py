"""List the files of photos that users name: files, folders, patterns, videos, objects."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from s4g_ray.errors import InputError
from s4g_ray.storage import files

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".tif", ".tiff", ".jp2", ".bmp", ".gif"),
    *(".ppm", ".avif", ".heic", ".heif", ".hif"),
)
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".3gp")
_REMEDY = "name an image, a video, a folder of them, or a pattern such as 'photos/*.jpg'"


def is_video(uri: str) -> bool:
    """Return whether a file is read as a video, by the ending of its name."""
    return uri.lower().endswith(VIDEO_ENDINGS)


def list_photos(sources: Sequence[str]) -> list[str]:
    """Return the files of some sources, in their order, and by name within a folder or pattern.

    A folder stands for the images and videos in it and below, without hidden ones. A file that is
    named itself is listed whatever its ending. Raises InputError for a source that is not there,
    and for a folder or pattern without photos.
    """
    found: list[str] = []
    for source in sources:
        if files.is_local(source):
            found.extend(_list_local(source))
        else:
            found.extend(_list_remote(source))
    return found


def _is_photo(name: str) -> bool:
    return name.lower().endswith((*IMAGE_ENDINGS, *VIDEO_ENDINGS))


def _list_local(source: str) -> list[str]:
    if Path(source).is_dir():
        found = _list_folder(source)
        if not found:
            raise InputError(f"{source} holds no image and no video; {_REMEDY}")
        return found
    if Path(source).exists():
        return [source]
    if glob.has_magic(source):
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - absolute patterns, too
        found = [path for path in matches if Path(path).is_file()]
        if not found:
            raise InputError(f"no file matches {source}; {_REMEDY}")
        return found
    raise InputError(f"{source} does not exist; {_REMEDY}")


def _list_folder(folder: str) -> list[str]:
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = (name for name in names if not name.startswith("."))
        found.extend(str(Path(parent, name)) for name in sorted(visible) if _is_photo(name))
    return sorted(found)


def _list_remote(source: str) -> list[str]:
    if _is_photo(source):
        return [source]
    names = [name for name in files.list_names(source) if _is_photo(name)]
    if not names:
        raise InputError(f"{source} holds no image and no video; {_REMEDY}")
    return [files.join(source, name) for name in sorted(names)]
