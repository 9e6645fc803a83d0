"""Share the steps of the converters: list a source, choose its layout, count missing images, write.

A converter opens a SourceFolder, chooses a layout with `choose_layout`, makes a Row for each image
that `has_image` or `has_pair` finds, and hands the rows to `write`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s4g_ray.amounts import count_noun, join_first
from s4g_ray.arrays import Bools
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.schema import gallery_splits
from s4g_ray.data.tables.view_columns import SPLIT_CODES
from s4g_ray.datasets.lists.file_names import describe_odd, empty_list_error, is_utf8
from s4g_ray.datasets.source_rows import Row, ViewRows, split_paths
from s4g_ray.errors import InputError, StoreError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

Options = TypeVar("Options")
SIGNS = {  # names at the top of each source that has a converter
    "cvusa": {"bingmap", "streetview"},
    "cvact": {"ACT_data.mat"},
    "vigor": {"splits", "Chicago"},
    "denseuav": {"Dense_GPS_ALL.txt", "train", "test"},
    "university1652": {"train", "test"},
    "sues200": {"drone_view_512", "satellite-view"},
    "gta-uav": {"drone", "satellite", "cross-area-drone2sate-train.json"},
    "uav-visloc": {"01", "02", "03"},
    "cvcities": {"captown", "maynila"},
}
IMAGES_AT_ONCE = 1 << 21  # that has_images looks for
NUM_LISTINGS = 16  # folders listed at a time: object stores answer slowly, but many at once


def make_options(kind: type[Options], converter: str, values: Mapping[str, Any]) -> Options:
    """Make a converter's options, a dataclass. Raises InputError that lists the names it has."""
    try:
        return kind(**values)
    except TypeError as error:
        names = ", ".join(kind.__annotations__)
        raise InputError(f"convert {converter}: {error}; options are {names}") from error


def is_number(text: str) -> bool:
    """Return whether a text is a whole number, 0 or larger, that an id can hold."""
    return text.isascii() and text.isdigit() and int(text) < 2**62


def is_position(lat: float, lon: float) -> bool:
    """Return whether these are WGS84 degrees (NaN is not)."""
    return abs(lat) <= 90 and abs(lon) <= 180


class SourceFolder:
    """A folder to convert from: local, or any URI that fsspec reads.

    Never opens an image and never asks for a single one: lists each folder once and compares names.
    Paths are relative to the source, or absolute.
    """

    def __init__(self, uri: str, report: Report = ignore_report) -> None:
        self.uri = files.absolute(uri)
        self._report = report
        self._names: dict[str, frozenset[str]] = {}  # by the folder's URI
        self._arrays: dict[str, pa.Array] = {}  # the same, of has_images
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
            self._names[uri] = frozenset(self._list(uri))
        return self._names[uri]

    def _list(self, uri: str) -> list[str]:
        try:
            names = files.list_names(uri)
        except NotADirectoryError:
            return []
        except OSError as error:
            raise InputError(f"{uri} cannot be listed: {error}") from error
        odd = [name for name in names if not is_utf8(name)]
        if not odd:
            return names
        self.add_note(f"{uri}: names that are not UTF-8, left out: {describe_odd(odd)}")
        return [name for name in names if is_utf8(name)]

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

    @contextmanager
    def open_file(self, path: str) -> Iterator[Any]:
        """Open a file to read its bytes. Raises InputError when it is missing or cannot be read."""
        filesystem, name = files.filesystem_of(self.join(path))
        with self._explained_errors(path), filesystem.open(name, "rb") as stream:
            yield stream

    @contextmanager
    def _explained_errors(self, path: str) -> Iterator[None]:
        """Raise InputError for a file that is missing or cannot be read."""
        uri = self.join(path)
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise InputError(
                f"{uri} is missing; {self.uri} holds {self._describe_top()}"
            ) from error
        except OSError as error:
            raise InputError(f"{uri} cannot be read: {error}") from error

    def read_bytes(self, path: str) -> bytes:
        """Read a whole file. Raises InputError when it is missing or cannot be read."""
        with self._explained_errors(path):
            return files.read_bytes(self.join(path))

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

        A location is 'FILE, line N'. Raises InputError as read_text, and for a file without lines.
        """
        uri = self.join(path)
        numbered = enumerate(self.read_text(path).splitlines(), 1)
        found = [(f"{uri}, line {number}", line) for number, line in numbered if line.strip()]
        if not found:
            raise empty_list_error(uri)
        return found

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

    def has_images(self, paths: pa.ChunkedArray, asked: Bools) -> Bools:
        """Return which of the asked paths[N] are in the listings of their folders.

        Counts those that are not as missing. Lists several folders at a time.
        """
        found = asked.copy()
        for start in range(0, len(paths), IMAGES_AT_ONCE):
            rows = start + np.flatnonzero(asked[start : start + IMAGES_AT_ONCE])
            if len(rows):
                part = paths.slice(start, IMAGES_AT_ONCE)
                if len(rows) < len(part):
                    part = part.take(pa.array(rows - start))
                found[rows] = self._find_images(part)
        return found

    def _find_images(self, paths: pa.ChunkedArray) -> Bools:
        folders, names = split_paths(paths)
        with ThreadPoolExecutor(NUM_LISTINGS) as pool:
            listings = list(pool.map(self._list_array, folders.dictionary.to_pylist()))
        codes = folders.indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        edges = np.searchsorted(codes[order], np.arange(len(listings) + 1))
        # so that those of a folder are a slice
        names = names.combine_chunks().take(pa.array(order))
        found = np.zeros(len(codes), dtype=bool)
        for number, listing in enumerate(listings):
            within = slice(edges[number], edges[number + 1])
            found[order[within]] = np.asarray(pc.is_in(names[within], value_set=listing))
        if not found.all():
            self._missing.update(dict.fromkeys(paths.filter(pa.array(~found)).to_pylist()))
        return found

    def _list_array(self, folder: str) -> pa.Array:
        """Return the names in a folder as list_names does, in a third of the memory."""
        uri = self.join(folder)
        if uri not in self._arrays:
            names = list(self._names[uri]) if uri in self._names else self._list(uri)
            self._arrays[uri] = pa.array(names, pa.large_string())
        return self._arrays[uri]

    def has_pair(self, reference: str, query: str) -> bool:
        """Return whether both images of a pair are there, and count the pair if not."""
        has_reference = self.has_image(reference)
        has_query = self.has_image(query)
        if has_reference and has_query:
            return True
        self._num_broken_pairs += 1
        return False

    def add_note(self, line: str) -> None:
        """Add a line to report after the missing images; the same one once."""
        if line not in self._notes:
            self._notes.append(line)

    def report(self, line: str) -> None:
        """Report a line at once."""
        self._report(line)

    def forget_missing(self, paths: Iterable[str]) -> None:
        """Count images as missing no longer, because they have another name."""
        for path in paths:
            self._missing.pop(path, None)

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
        """Write rows as write_rows does."""
        of_view = {
            "references": ViewRows.from_list(references, "references"),
            "queries": ViewRows.from_list(queries, "queries"),
        }
        return self.write_rows(target, **of_view, name=name, views=views, strict=strict)

    def write_rows(
        self,
        target: str,
        references: ViewRows,
        queries: ViewRows,
        *,
        name: str,
        views: Mapping[str, str],
        strict: bool,
    ) -> GeoDataset:
        """Report what was left out, drop train queries without a reference, and write the data set.

        Paths of images below the source are stored relative to it.
        Raises InputError when images are missing and `strict` is set, when no reference or no query
        is left, and for the errors of dataset.write_dataset.
        """
        self._report_missing(strict)
        if self._num_broken_pairs:
            self.add_note(f"pairs left out for a missing image: {self._num_broken_pairs:,}")
        kept = self._with_train_reference(references, queries)
        self._note_unmatched(references, queries)
        self._note_empty_splits(queries.splits[kept])
        for line in self._notes:
            self._report(line)
        for view, count in (("references", len(references.splits)), ("queries", kept.sum())):
            if not count:
                raise InputError(
                    f"{self.uri}: no {view} are left to convert;"
                    f" {count_noun(len(self._missing), 'image')} missing"
                )
        everything = np.ones(len(references.splits), dtype=bool)
        tables = (references.make_tables(everything), queries.make_tables(kept))
        return write_dataset(
            target, *tables, name=name, views=views, images_root=self.uri, values=references.values
        )

    def _report_missing(self, strict: bool) -> None:
        if not self._missing:
            return
        count = f"missing images: {len(self._missing):,}"
        first = join_first(list(self._missing))
        if strict:
            raise InputError(f"{self.uri}: {count}: {first}; add them, or convert without --strict")
        self._report(f"{count}, left out with their rows: {first}")

    def _with_train_reference(self, references: ViewRows, queries: ViewRows) -> Bools:
        """Return which queries can stay, and note how many train queries cannot."""
        train = SPLIT_CODES["train"]
        places = references.place_ids[references.splits == train]
        kept = (queries.splits != train) | np.isin(queries.place_ids, places)
        if not kept.all():
            self.add_note(
                "train queries left out because their place has no train reference:"
                f" {int((~kept).sum()):,}"
            )
        return np.asarray(kept)

    def _note_unmatched(self, references: ViewRows, queries: ViewRows) -> None:
        for split in ("val", "test"):
            codes = [SPLIT_CODES[name] for name in gallery_splits(split)]
            places = references.place_ids[np.isin(references.splits, codes)]
            tested = queries.place_ids[queries.splits == SPLIT_CODES[split]]
            count = int((~np.isin(tested, places)).sum())
            if count:
                self.add_note(
                    f"{split} queries that evaluation leaves out because their place has no"
                    f" reference: {count:,}"
                )

    def _note_empty_splits(self, splits: NDArray[np.uint8]) -> None:
        """Note what queries of these splits cannot be used for."""
        if not (splits == SPLIT_CODES["train"]).any():
            self.add_note("no train queries: nothing to train on")
        if not np.isin(splits, [SPLIT_CODES["val"], SPLIT_CODES["test"]]).any():
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
