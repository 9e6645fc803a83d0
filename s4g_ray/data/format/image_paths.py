"""Store the paths of images relative to a folder that may move, and resolve them again.

Paths below a data set's folder, or below a folder beside it, are stored relative, so that both may
move together. Where images lie elsewhere, dataset.json names their folder, `images_root`, which can
be given anew.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.storage import files

UP = "../"
Prefixes = list[tuple[str, str]]  # what absolute paths start with, and what is stored instead


def split_scheme(uri: str) -> tuple[str, str]:
    """Return `s3://` and the path after it; "" for a local path."""
    scheme, separator, path = uri.partition("://")
    return (f"{scheme}://", path) if separator else ("", uri)


def are_whole(paths: pa.Array | pa.ChunkedArray) -> Any:
    """Return which of paths[N] are absolute or URIs, and start from no folder."""
    return pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://"))


def is_whole(path: str) -> bool:
    """Return whether a path is absolute or a URI, and starts from no folder."""
    return path.startswith("/") or "://" in path


def resolve(folder: str, path: str) -> str:
    """Return the absolute path or URI of a path relative to a folder, without `..` at its start."""
    joined = files.join(folder, path)
    if not path.startswith("..") or joined == path:
        return joined
    scheme, rest = split_scheme(joined)
    return scheme + posixpath.normpath(rest)


def relate(dataset: str, root: str) -> str | None:
    """Return the folder of the images as dataset.json stores it, None for the data set's own.

    dataset, root: absolute. Relative where the root lies below the data set, beside it (below the
    folder that holds it) or above it; otherwise absolute.
    """
    if dataset.rstrip("/") == root.rstrip("/"):
        return None
    scheme, here = split_scheme(dataset.rstrip("/"))
    other_scheme, there = split_scheme(root.rstrip("/"))
    above = posixpath.dirname(here)
    if scheme != other_scheme or above in ("", "/") or there in ("", "/"):
        return root
    if f"{there}/".startswith(f"{above}/") or f"{here}/".startswith(f"{there}/"):
        return posixpath.relpath(there, here)
    return root


def find_root(dataset: str, stored: str | None) -> str:
    """Return the absolute folder of the images of a data set, from what dataset.json stores.

    A data set that was opened by a link to its folder has its images in and beside the folder
    itself.
    """
    if stored is None:
        return str(Path(dataset).resolve()) if _is_link(dataset) else dataset
    root = resolve(dataset, stored)
    if stored.startswith("..") and files.is_local(dataset) and not Path(root).is_dir():
        real = resolve(str(Path(dataset).resolve()), stored)
        if Path(real).is_dir():
            return real
    return root


def _is_link(dataset: str) -> bool:
    return files.is_local(dataset) and Path(dataset).is_symlink()


def list_prefixes(dataset: str, root: str) -> Prefixes:
    """List the starts of absolute paths that are stored relative to the root, longest first.

    Paths beside the root are where they move along with the data set: not above it, nor beside a
    link to it.
    """
    root = root.rstrip("/")
    prefixes = [(f"{root}/", "")]
    stored = relate(dataset, root)
    above = posixpath.dirname(split_scheme(root)[1])
    if stored is None:
        is_near = not _is_link(dataset)
    else:
        is_above = stored in ("..", UP + "..")
        is_near = not is_above and not stored.startswith(("/", UP + UP)) and "://" not in stored
    if is_near and above not in ("", "/"):
        prefixes.append((f"{split_scheme(root)[0]}{above}/", UP))
    return prefixes


def shorten(paths: pa.ChunkedArray, prefixes: Prefixes) -> pa.ChunkedArray:
    """Replace the prefixes of absolute paths; paths: strings."""
    for prefix, replacement in prefixes:
        found = pc.starts_with(paths, prefix)
        if not pc.any(found).as_py():
            continue
        rest = pc.utf8_slice_codeunits(paths, len(prefix))
        is_relative = pc.invert(pc.or_(pc.starts_with(rest, "/"), pc.match_substring(rest, "//")))
        if replacement:
            rest = pc.binary_join_element_wise(pa.scalar(replacement, rest.type), rest, "")
        paths = pc.if_else(pc.and_(found, is_relative), rest, paths)
    return paths
