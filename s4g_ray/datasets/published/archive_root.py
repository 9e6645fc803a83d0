"""Find the folder of an archive where a data set lies, by the files and folders that it must hold.

Archives are unpacked one folder too deep or too high, and their folders are renamed. The root is
looked for in the given folder, in the folders below it and in those above it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from s4g_ray.amounts import join_first
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report

LEVELS_BELOW = 2
LEVELS_ABOVE = 2
MAX_FOLDERS = 64  # of one level that are looked into: a folder of images holds thousands
LIKENESS = 0.8  # of two names, as difflib has it, above which one is likely the other renamed


def open_root(
    source: str,
    layouts: Mapping[str, Sequence[str]],
    report: Report = ignore_report,
    remedy: str = "",
) -> tuple[SourceFolder, str]:
    """Open the folder where a layout is complete; return it and the name of the layout.

    layouts: the paths that each layout needs, by its name. The given folder counts first; of others
    exactly one must have a complete layout, and a line reports it. Raises InputError where none or
    several have: the message lists them, or what is lacking and which names are likely renamed.
    """
    given = SourceFolder(source, report)
    layout = find_complete(given, layouts)
    if layout is not None:
        return given, layout
    found: dict[str, tuple[SourceFolder, str]] = {}
    for uri in _list_candidates(given):
        folder = SourceFolder(uri, report)
        layout = find_complete(folder, layouts)
        if layout is not None:
            found[folder.uri] = folder, layout
    if len(found) > 1:
        raise InputError(
            f"{given.uri} holds several data sets: {join_first(sorted(found))}; name one of them"
        )
    if found:
        [(folder, layout)] = found.values()
        report(f"the data set lies in {folder.uri}, not in {given.uri}: converted from there")
        return folder, layout
    renamed = _list_renamed(given, layouts)
    lines = [remedy] if remedy else []
    if renamed:
        lines.append(f"likely renamed: {join_first(renamed)}; give them the names that are needed")
    return given, given.choose_layout(layouts, "\n".join(lines))


def find_complete(folder: SourceFolder, layouts: Mapping[str, Sequence[str]]) -> str | None:
    """Return the first layout of which a folder has all paths; None where it has none."""
    for name, paths in layouts.items():
        if all(folder.has(path) for path in paths):
            return name
    return None


def _list_candidates(given: SourceFolder) -> Iterator[str]:
    """Yield the folders below and above the given one, the nearest first."""
    level = [""]
    for _ in range(LEVELS_BELOW):
        level = [
            f"{parent}/{name}".lstrip("/")
            for parent in level
            for name in _list_folders(given, parent)
        ][:MAX_FOLDERS]
        yield from (given.join(path) for path in level)
    uri = given.uri.rstrip("/")
    for _ in range(LEVELS_ABOVE):
        parent = uri.rpartition("/")[0]
        if not parent or parent.endswith(":/"):
            return
        uri = parent
        yield uri


def _list_folders(folder: SourceFolder, path: str) -> list[str]:
    """Return the first names of a folder that look like folders: without a suffix, not hidden."""
    names = [name for name in sorted(folder.list_names(path)) if not PurePosixPath(name).suffix]
    return [name for name in names if not name.startswith((".", "__"))][:MAX_FOLDERS]


def _list_renamed(folder: SourceFolder, layouts: Mapping[str, Sequence[str]]) -> list[str]:
    """Return 'NEEDED is there as FOUND' for the lacking paths of the nearest layout."""
    lacking = {
        name: [path for path in paths if not folder.has(path)] for name, paths in layouts.items()
    }
    nearest = min(lacking.values(), key=len)
    found = {}
    for path in nearest:
        parent = ""
        for name in path.split("/"):
            needed = f"{parent}/{name}".lstrip("/")
            names = folder.list_names(parent)
            if name not in names:
                like = _find_like(name, names)
                if like is None:
                    break
                found[needed] = f"{needed} is there as {like}"
                name = like
            parent = f"{parent}/{name}".lstrip("/")
    return list(found.values())


def _find_like(name: str, names: frozenset[str]) -> str | None:
    """Return the name that is most like another, if it is like it at all."""
    by_form: dict[str, str] = {}
    for other in sorted(names):
        by_form.setdefault(_normalise(other), other)
    forms = difflib.get_close_matches(_normalise(name), list(by_form), 1, LIKENESS)
    return by_form[forms[0]] if forms else None


def _normalise(name: str) -> str:
    """Return a name without case, order and separators of its words."""
    words = re.findall(r"[a-z]+|\d+", name.lower())
    return " ".join(sorted(words))
