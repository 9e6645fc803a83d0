"""Share the steps of the converters: list a source, choose its layout, count missing images, write.

A converter opens a SourceFolder, chooses a layout with `choose_layout`, makes a Row for each image
that `has_image` or `has_pair` finds, and hands the rows to `write`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.schema import SCHEMAS, gallery_splits
from s4g_ray.errors import InputError
from s4g_ray.storage import files

Report = Callable[[str], None]  # takes one line about rows, images or files that were left out
SIGNS = {  # names at the top of each source that has a converter
    "cvusa": {"bingmap", "streetview"},
    "cvact": {"ACT_data.mat"},
    "vigor": {"splits", "Chicago"},
    "university1652": {"train", "test"},
}
NUM_LISTED = 10  # names in one message
NUM_LISTINGS = 16  # folders listed at a time: object stores answer slowly, but many at once


def ignore_report(line: str) -> None:
    """Do nothing: a Report for callers that show nothing."""


def join_first(names: Sequence[str]) -> str:
    """Join the first NUM_LISTED names with commas, and add how many more there are."""
    text = ", ".join(names[:NUM_LISTED])
    if len(names) > NUM_LISTED:
        text += f" and {len(names) - NUM_LISTED:,} more"
    return text


def is_number(text: str) -> bool:
    """Return whether a text is a whole number, 0 or larger, that an id can hold."""
    return text.isascii() and text.isdigit() and int(text) < 2**62


def is_position(lat: float, lon: float) -> bool:
    """Return whether these are WGS84 degrees (NaN is not)."""
    return abs(lat) <= 90 and abs(lon) <= 180


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a data set, with the columns of both tables. Degrees are WGS84."""

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
    """A folder to convert from: local, or any URI that fsspec reads.

    Never opens an image and never asks for a single one: lists each folder once and compares names.
    Paths are relative to the source, or absolute.
    """

    def __init__(self, uri: str, report: Report = ignore_report) -> None:
        self.uri = files.absolute(uri)
        self._report = report
        self._names: dict[str, frozenset[str]] = {}  # by the folder's URI
        self._missing: dict[str, None] = {}  # paths of images; an ordered set
        self._notes: list[str] = []
        self._num_broken_pairs = 0

    def join(self, path: str) -> str:
        """Return the absolute path or URI of a path in the source."""
        return files.join(self.uri, path) if path else self.uri

    def list_names(self, folder: str = "") -> frozenset[str]:
        """Return the names in a folder, which is listed once; empty when the folder is missing.

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
            for _ in pool.map(self.list_names, dict.fromkeys(folders)):
                pass

    def has(self, path: str) -> bool:
        """Return whether a file or folder exists, by the listings of the folders above it."""
        parts = path.split("/")
        return all(
            name in self.list_names("/".join(parts[:depth])) for depth, name in enumerate(parts)
        )

    def read_bytes(self, path: str) -> bytes:
        """Read a whole file. Raises InputError when it is missing or cannot be read."""
        uri = self.join(path)
        try:
            return files.read_bytes(uri)
        except FileNotFoundError as error:
            raise InputError(
                f"{uri} is missing; {self.uri} holds {self._describe_top()}"
            ) from error
        except OSError as error:
            raise InputError(f"{uri} cannot be read: {error}") from error

    def read_text(self, path: str) -> str:
        """Read a UTF-8 file, without its byte-order mark.

        Raises InputError when it is missing or not UTF-8.
        """
        try:
            return self.read_bytes(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.join(path)} is not UTF-8 text: {error}; save it as UTF-8"
            ) from error

    def read_lines(self, path: str) -> list[tuple[str, str]]:
        """Read the lines of a text file that are not blank, each with its location.

        A location is 'FILE, line N'. Raises InputError as read_text does.
        """
        uri = self.join(path)
        numbered = enumerate(self.read_text(path).splitlines(), 1)
        return [(f"{uri}, line {number}", line) for number, line in numbered if line.strip()]

    def choose_layout(self, layouts: Mapping[str, Sequence[str]], remedy: str = "") -> str:
        """Return the name of the first layout whose files and folders all exist.

        `layouts` gives the paths that each layout needs, by its name. Raises InputError when no
        layout is complete: the message lists what each needs, what exists, and the nearest one.
        """
        lacking = {
            name: [path for path in paths if not self.has(path)] for name, paths in layouts.items()
        }
        nearest = min(lacking, key=lambda name: len(lacking[name]))
        if not lacking[nearest]:
            return nearest
        if not self.list_names():
            raise InputError(f"{self.uri} is empty or missing")
        lines = [f"{self.uri} has no known layout; it holds {self._describe_top()}"]
        for name, paths in layouts.items():
            lines.append(f"layout {name!r} needs {join_first(paths)}")
        lines.append(
            f"nearest: {nearest!r}, which lacks {self._describe_lacking(lacking[nearest])}"
        )
        if len(lacking[nearest]) == len(layouts[nearest]):
            lines.extend(self._guess_converters())
        if remedy:
            lines.append(remedy)
        raise InputError("\n".join(lines))

    def has_image(self, path: str) -> bool:
        """Return whether an image is in its folder's listing, and count it as missing if not."""
        folder, _, name = path.rpartition("/")
        found = name in self.list_names(folder)
        if not found:
            self._missing[path] = None
        return found

    def has_pair(self, reference: str, query: str) -> bool:
        """Return whether both images of a pair are there, and count the pair if not."""
        has_reference = self.has_image(reference)
        has_query = self.has_image(query)
        if has_reference and has_query:
            return True
        self._num_broken_pairs += 1
        return False

    def add_note(self, line: str) -> None:
        """Add a line to report after the missing images."""
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

        Raises InputError when images are missing and `strict` is set, when no reference or no query
        is left, and for the errors of dataset.write_dataset.
        """
        self._report_missing(strict)
        if self._num_broken_pairs:
            self.add_note(f"pairs left out for a missing image: {self._num_broken_pairs:,}")
        queries = self._with_train_reference(references, queries)
        self._note_unmatched(references, queries)
        self._note_empty_splits(queries)
        for line in self._notes:
            self._report(line)
        tables = []
        for view, rows in (("references", references), ("queries", queries)):
            if not rows:
                raise InputError(
                    f"{self.uri}: no {view} are left to convert;"
                    f" {len(self._missing):,} images missing"
                )
            tables.append(pa.Table.from_pylist([vars(row) for row in rows], schema=SCHEMAS[view]))
        return write_dataset(target, *tables, name=name, views=views)

    def _report_missing(self, strict: bool) -> None:
        if not self._missing:
            return
        count = f"missing images: {len(self._missing):,}"
        first = join_first(list(self._missing))
        if strict:
            raise InputError(f"{self.uri}: {count}: {first}; add them, or convert without --strict")
        self._report(f"{count}, left out with their rows: {first}")

    def _with_train_reference(self, references: list[Row], queries: list[Row]) -> list[Row]:
        places = {row.place_id for row in references if row.split == "train"}
        kept = [row for row in queries if row.split != "train" or row.place_id in places]
        if len(kept) < len(queries):
            self.add_note(
                "train queries left out because their place has no train reference:"
                f" {len(queries) - len(kept):,}"
            )
        return kept

    def _note_unmatched(self, references: list[Row], queries: list[Row]) -> None:
        for split in ("val", "test"):
            places = {row.place_id for row in references if row.split in gallery_splits(split)}
            count = sum(row.split == split and row.place_id not in places for row in queries)
            if count:
                self.add_note(
                    f"{split} queries that evaluation leaves out because their place has no"
                    f" reference: {count:,}"
                )

    def _note_empty_splits(self, queries: list[Row]) -> None:
        splits = {row.split for row in queries}
        if "train" not in splits:
            self.add_note("no train queries: nothing to train on")
        if not splits & {"val", "test"}:
            self.add_note("no test queries: nothing to evaluate on")

    def _guess_converters(self) -> list[str]:
        """Return a line for each converter whose source has these names at its top."""
        return [
            f"this looks like {name}: s4g convert {name}"
            for name, top in SIGNS.items()
            if top <= self.list_names()
        ]

    def _describe_top(self) -> str:
        return join_first(sorted(self.list_names())) or "nothing, or is missing"

    def _describe_lacking(self, paths: Sequence[str]) -> str:
        """Join missing paths, with the names in the deepest folder above each that exists."""
        groups: dict[str, list[str]] = {}
        for path in paths:
            parent = path.rpartition("/")[0]
            while parent and not self.has(parent):
                parent = parent.rpartition("/")[0]
            groups.setdefault(parent, []).append(path)
        parts = []
        for parent, lacking in groups.items():
            part = join_first(lacking)
            if parent:
                holds = join_first(sorted(self.list_names(parent))) or "nothing"
                part += f" ({parent} holds {holds})"
            parts.append(part)
        return "; ".join(parts)
