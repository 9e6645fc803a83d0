"""List the files of photos that users name: files, folders, patterns, videos, objects."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from s4g_ray.errors import InputError, RunError, first_line
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
    try:
        is_folder, is_there = Path(source).is_dir(), Path(source).exists()
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise InputError(f"{source} cannot be read: {error.strerror}; {_REMEDY}") from error
    if is_folder:
        found = _list_folder(source)
        if not found:
            raise InputError(f"{source} holds no image and no video; {_REMEDY}")
        return found
    if is_there:
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
    try:
        filesystem, folder = files.filesystem_of(source)
        filesystem.invalidate_cache()
        paths = filesystem.find(folder)
    except RunError:
        raise
    except Exception as error:  # of many kinds: each scheme of a URI has its own
        raise InputError(f"{source} cannot be listed: {first_line(error)}; {_REMEDY}") from error
    names = [path.removeprefix(folder).lstrip("/") for path in paths]
    visible = (name for name in names if not any(x.startswith(".") for x in name.split("/")))
    found = sorted(name for name in visible if _is_photo(name))
    if not found:
        raise InputError(f"{source} holds no image and no video; {_REMEDY}")
    return [files.join(source, name) for name in found]
