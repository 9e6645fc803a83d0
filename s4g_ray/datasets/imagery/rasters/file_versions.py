"""Tell whether files have changed, by their sizes and times, or tags of an object store."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from s4g_ray.storage import files

NUM_ASKED = 16  # at a time: object stores answer slowly


def fingerprint_files(uris: Iterable[str]) -> str:
    """Return a text that differs once a file is written anew; of folders, any file below them."""
    found = []
    with ThreadPoolExecutor(NUM_ASKED) as pool:
        entries = list(pool.map(_look_up, sorted(set(uris))))
        while entries:
            found += [_describe(entry) for entry in entries if entry["type"] != "directory"]
            folders = [entry["uri"] for entry in entries if entry["type"] == "directory"]
            entries = [entry for part in pool.map(_list, folders) for entry in part]
    return files.fingerprint(repr(sorted(found)).encode())


def _look_up(uri: str) -> dict[str, Any]:
    filesystem, path = files.filesystem_of(uri)
    try:
        return {**filesystem.info(path), "uri": uri}
    except (OSError, ValueError):  # nothing that storage/ reads, such as /vsizip/
        return {"uri": uri, "type": "other", "size": 0}


def _list(folder: str) -> list[dict[str, Any]]:
    filesystem, path = files.filesystem_of(folder)
    return [
        {**entry, "uri": files.join(folder, entry["name"].rstrip("/").rpartition("/")[2])}
        for entry in filesystem.ls(path, detail=True)
        if entry["name"].rstrip("/") != path.rstrip("/")  # an object with the folder's own name
    ]


def _describe(entry: dict[str, Any]) -> tuple[str, int, str]:
    version = entry.get("ETag") or entry.get("mtime") or entry.get("LastModified")
    return entry["uri"], entry["size"], str(version)
