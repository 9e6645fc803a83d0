"""What the converters share: a source's listings and texts, its layout, its missing images, and the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.schema import SCHEMAS, gallery_splits
from s4g_ray.errors import InputError
from s4g_ray.storage import files

Report = Callable[[str], None]  # takes one line about what was left out
SIGNS = {  # what lies at the top of the sources that have a converter
    "cvusa": {"bingmap", "streetview"},
    "cvact": {"ACT_data.mat"},
    "vigor": {"splits", "Chicago"},
    "university1652": {"train", "test"},
}
NUM_LISTED = 10  # names in one message
NUM_LISTINGS = 16  # folders listed at a time: object stores answer slowly, but many at once


def silent(line: str) -> None:
    """A Report for callers that show nothing."""


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NUM_LISTED:,} more" if len(names) > NUM_LISTED else ""
    return ", ".join(names[:NUM_LISTED]) + more


def is_number(text: str) -> bool:
    """Whether a text is a whole number from 0 on that an id can hold."""
    return text.isascii() and text.isdigit() and int(text) < 2**62


def valid_position(lat: float, lon: float) -> bool:
    """Whether these are WGS84 degrees (NaN is not)."""
    return abs(lat) <= 90 and abs(lon) <= 180


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a data set, with the columns of either table; degrees are WGS84."""

    id: int
    place_id: int
    uri: str
    split: str
    lat: float | None = None
    lon: float | None = None
    region: str | None = None
    source_id: str | None = None
    heading_deg: float | None = None
    semi_positives: list[int] | None = None


class SourceFolder:
    """A folder to convert from, local or any URI that fsspec reads.

    Images are never opened and never asked for one by one: each folder is listed once, and names are compared.
    Paths are relative to the source, or absolute.
    """

    def __init__(self, uri: str, report: Report = silent) -> None:
        self.uri = files.absolute(uri)
        self._report = report
        self._names: dict[str, frozenset[str]] = {}
        self._missing: dict[str, None] = {}  # an ordered set
        self._notes: list[str] = []
        self._num_broken_pairs = 0

    def join(self, path: str) -> str:
        """The absolute path or URI of something in the source."""
        return files.join(self.uri, path) if path else self.uri

    def names(self, folder: str = "") -> frozenset[str]:
        """The names in a folder, listed once; empty when there is no such folder.

        Raises InputError when the folder cannot be listed.
        """
        uri = self.join(folder)
        if uri not in self._names:
            try:
                self._names[uri] = frozenset(files.list_names(uri))
            except NotADirectoryError:
                self._names[uri] = frozenset()
            except OSError as error:
                raise InputError(f"{uri} cannot be listed: {error}") from error
        return self._names[uri]

    def prefetch(self, folders: Iterable[str]) -> None:
        """List folders, several at a time."""
        with ThreadPoolExecutor(NUM_LISTINGS) as pool:
            for _ in pool.map(self.names, dict.fromkeys(folders)):
                pass

    def has(self, path: str) -> bool:
        """Whether a file or folder is there, by the listings of the folders above it."""
        parts = path.split("/")
        return all(name in self.names("/".join(parts[:depth])) for depth, name in enumerate(parts))

    def read_bytes(self, path: str) -> bytes:
        """A whole file. Raises InputError when it is missing or cannot be read."""
        uri = self.join(path)
        try:
            return files.read_bytes(uri)
        except FileNotFoundError as error:
            raise InputError(f"{uri} is missing; {self.uri} holds {self._top()}") from error
        except OSError as error:
            raise InputError(f"{uri} cannot be read: {error}") from error

    def read_text(self, path: str) -> str:
        """A UTF-8 file, without its byte-order mark. Raises InputError when it is missing or not UTF-8."""
        try:
            return self.read_bytes(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.join(path)} is not UTF-8 text: {error}; save it as UTF-8"
            ) from error

    def lines(self, path: str) -> list[tuple[str, str]]:
        """The lines of a text file that are not blank, each with its place: 'FILE, line N'."""
        found = enumerate(self.read_text(path).splitlines(), 1)
        return [
            (f"{self.join(path)}, line {number}", line) for number, line in found if line.strip()
        ]

    def choose(self, variants: Mapping[str, Sequence[str]], remedy: str = "") -> str:
        """The first variant whose files and folders are all there.

        Raises one InputError that says what each variant looks for, what is there, and which is nearest.
        """
        lacking = {
            name: [path for path in paths if not self.has(path)] for name, paths in variants.items()
        }
        nearest = min(lacking, key=lambda name: len(lacking[name]))
        if not lacking[nearest]:
            return nearest
        if not self.names():
            raise InputError(f"{self.uri} is empty, or is not there")
        wanted = [f"layout {name!r} looks for {some(paths)}" for name, paths in variants.items()]
        lines = [
            f"{self.uri} has no layout that is known here; it holds {self._top()}",
            *wanted,
            f"nearest: {nearest!r}, which lacks {self._describe(lacking[nearest])}",
            *([] if len(lacking[nearest]) < len(variants[nearest]) else self._guesses()),
            *([remedy] if remedy else []),
        ]
        raise InputError("\n".join(lines))

    def _guesses(self) -> list[str]:
        return [
            f"this looks like {name}: s4g convert {name}"
            for name, top in SIGNS.items()
            if top <= self.names()
        ]

    def image(self, path: str) -> bool:
        """Whether an image is in its folder's listing; one that is not is remembered as missing."""
        folder, _, name = path.rpartition("/")
        found = name in self.names(folder)
        if not found:
            self._missing[path] = None
        return found

    def pair(self, reference: str, query: str) -> bool:
        """Whether both images of a pair are there; a pair that is not whole is counted."""
        whole = all([self.image(reference), self.image(query)])  # a list: both are looked for
        self._num_broken_pairs += not whole
        return whole

    def note(self, line: str) -> None:
        """Say, after the missing images, that something else was left out."""
        self._notes.append(line)

    def write(
        self,
        target: str,
        references: list[Row],
        queries: list[Row],
        *,
        name: str,
        views: Mapping[str, str],
        strict: bool,
    ) -> GeoDataset:
        """Report what was left out, drop train queries without a reference, and write the data set.

        Raises InputError when images are missing and `strict` is set, when nothing is left, and for whatever
        dataset.write_dataset refuses.
        """
        self._report_missing(strict)
        if self._num_broken_pairs:
            self.note(f"pairs left out for a missing image: {self._num_broken_pairs:,}")
        queries = self._with_train_reference(references, queries)
        self._count_unmatched(references, queries)
        held = {row.split for row in queries}
        if "train" not in held:
            self.note("no train queries: nothing to train on")
        if not held & {"val", "test"}:
            self.note("no test queries: nothing to evaluate on")
        for line in self._notes:
            self._report(line)
        for view, rows in (("references", references), ("queries", queries)):
            if not rows:
                raise InputError(
                    f"{self.uri}: no {view} are left to convert; {len(self._missing):,} images missing"
                )
        tables = [
            pa.Table.from_pylist([vars(row) for row in rows], schema=SCHEMAS[view])
            for view, rows in (("references", references), ("queries", queries))
        ]
        return write_dataset(target, *tables, name=name, views=views)

    def _report_missing(self, strict: bool) -> None:
        if not self._missing:
            return
        count, shown = f"missing images: {len(self._missing):,}", some(list(self._missing))
        if strict:
            raise InputError(f"{self.uri}: {count}: {shown}; add them, or convert without --strict")
        self._report(f"{count}, left out with their rows: {shown}")

    def _with_train_reference(self, references: list[Row], queries: list[Row]) -> list[Row]:
        places = {row.place_id for row in references if row.split == "train"}
        kept = [row for row in queries if row.split != "train" or row.place_id in places]
        if len(kept) < len(queries):
            self.note(
                f"train queries left out, as their place has no train reference: {len(queries) - len(kept):,}"
            )
        return kept

    def _count_unmatched(self, references: list[Row], queries: list[Row]) -> None:
        for split in ("val", "test"):
            places = {row.place_id for row in references if row.split in gallery_splits(split)}
            count = sum(row.split == split and row.place_id not in places for row in queries)
            if count:
                self.note(
                    f"{split} queries that evaluation leaves out, as their place has no reference: {count:,}"
                )

    def _top(self) -> str:
        return some(sorted(self.names())) or "nothing, or is not there"

    def _describe(self, paths: Sequence[str]) -> str:
        """Paths that are missing, with what lies in the folder where each search ended."""
        groups: dict[str, list[str]] = {}
        for path in paths:
            parent = path.rpartition("/")[0]
            while parent and not self.has(parent):
                parent = parent.rpartition("/")[0]
            groups.setdefault(parent, []).append(path)
        return "; ".join(
            some(lacking)
            + (
                f" ({parent} holds {some(sorted(self.names(parent))) or 'nothing'})"
                if parent
                else ""
            )
            for parent, lacking in groups.items()
        )
