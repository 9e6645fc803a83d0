"""Match paths of a list with files whose names are written in another way.

Names that differ by Unicode form (NFC, NFD), letter case, `\\` for `/`, or the spelling of an
extension (.jpg, .jpeg; .tif, .tiff) are likely the same file, where only one file is like that.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.datasets.source import SourceFolder

EXTENSIONS = {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".tiff": ".tif"}


def _normalize_form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _normalize_case(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def _normalize_extension(name: str) -> str:
    name = _normalize_case(name)
    stem, dot, extension = name.rpartition(".")
    return stem + EXTENSIONS.get(dot + extension, dot + extension) if stem else name


# from the least difference to the largest
DIFFERENCES: dict[str, Callable[[str], str]] = {
    "Unicode form": _normalize_form,
    "letter case": _normalize_case,
    "extension": _normalize_extension,
}


@dataclass(frozen=True)
class NameMatches:
    """The files that missing paths likely mean, and how often names differ by what."""

    paths: dict[str, str]  # the path of the list -> that of the file
    differences: Counter[str]

    def describe(self) -> str:
        """Return the number of matches by difference, and the first one."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.differences.most_common())
        listed, found = next(iter(self.paths.items()))
        return f"{len(self.paths):,} (by {counts}), the first {found!r} for {listed!r}"


class _Folders:
    """The names in folders of a source, by what is left of them without a difference."""

    def __init__(self, source_folder: SourceFolder) -> None:
        self._source = source_folder
        self._names: dict[tuple[str, str], dict[str, list[str]]] = {}

    def find(self, folder: str, name: str) -> tuple[str, str] | None:
        """Return the one name that is most like a name, and the difference ("" for none)."""
        names = self._source.list_names(folder)
        if name in names:
            return name, ""
        for difference, normalize in DIFFERENCES.items():
            if (folder, difference) not in self._names:
                groups: dict[str, list[str]] = {}
                for known in names:
                    groups.setdefault(normalize(known), []).append(known)
                self._names[folder, difference] = groups
            found = self._names[folder, difference].get(normalize(name), [])
            if found:
                return (found[0], difference) if len(found) == 1 else None
        return None


def find_matches(
    source_folder: SourceFolder, missing: Iterable[str], listed: pa.ChunkedArray
) -> NameMatches:
    """Find the files that missing paths likely mean.

    No file is matched twice, nor one that the list names itself: listed, all its paths. Lists the
    folders on the way, each once.
    """
    folders = _Folders(source_folder)
    found = {path: _match_path(folders, path) for path in missing}
    likely = {path: match for path, match in found.items() if match is not None}
    used = Counter(file for file, _ in likely.values())
    names = pa.array(list(used), pa.string())
    taken = set(names.filter(pc.is_in(names, value_set=listed)).to_pylist())
    paths = {}
    differences: Counter[str] = Counter()
    for path, (file, kinds) in likely.items():
        if used[file] == 1 and file not in taken:
            paths[path] = file
            differences.update(kinds)
    return NameMatches(paths, differences)


def _match_path(folders: _Folders, path: str) -> tuple[str, set[str]] | None:
    """Return the path of the file, and the differences; None where no single file is like it."""
    differences = set()
    if "\\" in path:
        path = path.replace("\\", "/")
        differences.add("\\ for /")
    above, _, _ = path.rpartition("/")
    if path.startswith("/") or "://" in path:
        done = above or "/"  # only the name itself may differ
        parts = [path.rpartition("/")[2]]
    else:
        done = ""
        parts = [part for part in path.split("/") if part not in ("", ".")]
    for part in parts:
        match = folders.find(done, part)
        if match is None:
            return None
        done = f"{done.rstrip('/')}/{match[0]}" if done else match[0]
        if match[1]:
            differences.add(match[1])
    return (done, differences) if differences else None
