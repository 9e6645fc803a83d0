"""Find and parse the columns of a list of images: whole columns by Arrow, or one row exactly.

Rows are parsed one by one where a column holds a value that Arrow does not read or that is refused.
That decides what is accepted and words the errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.image_table import View
from s4g_ray.data.schema import SPLITS
from s4g_ray.data.tables.view_columns import SPLIT_CODES
from s4g_ray.datasets.lists.column_names import find_columns, name_columns
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.datasets.lists.number_format import PLAIN_NUMBERS, NumberFormat, explain_position
from s4g_ray.datasets.source import is_number, is_position
from s4g_ray.errors import InputError


@dataclass(frozen=True)
class ListedRow:
    """A row of a list."""

    id: int
    path: str
    lat: float | None
    lon: float | None
    key: str
    split: str  # empty without a column
    region: str | None
    heading: float | None


@dataclass(frozen=True)
class ListedChunk:
    """Consecutive rows of a list, as columns [n]; NaN and null where a value is empty."""

    numbers: Ints  # lines, or rows of a Parquet file
    ids: Ints
    lat: Floats64
    lon: Floats64
    splits: NDArray[np.uint8]  # as in SPLIT_CODES; 0 without a column
    headings: NDArray[np.float32] | None
    texts: pa.Table  # path; key and region where the list has them


class _NotPlainError(Exception):
    """A column holds a value that is parsed, or refused, with its row."""


@dataclass(frozen=True)
class ListColumns:
    """The columns of a list: where each value is in a row, and how it is read.

    The keys of `index` are path, lat, lon, key, split, region, heading and id: those that this list
    has a column for.
    """

    names: list[str]
    index: dict[str, int]
    view: View
    needs_position: bool  # coordinates may not be empty
    numbers: NumberFormat = PLAIN_NUMBERS

    @classmethod
    def find(cls, location: str, names: list[str], view: View, options: ListOptions) -> ListColumns:
        """Find the columns in a header. Raises InputError when one that is needed is missing."""
        wanted = name_columns(names, view, options)
        index = find_columns(location, names, wanted)
        has_exif = options.from_exif and view == "queries"
        return cls(names, index, view, options.pair == "nearest" and not has_exif)

    def with_sample(self, sample: Mapping[str, Sequence[str]], options: ListOptions) -> ListColumns:
        """Return the columns with the number format of a sample of values, by kind."""
        names = {kind: self.name(kind) for kind in self.index}
        return replace(self, numbers=NumberFormat.from_sample(names, sample, options.decimal))

    def parse_columns(
        self, columns: Mapping[str, Any], numbers: Ints, first_id: int
    ) -> ListedChunk | None:
        """Parse columns of texts or of numbers, by the keys of `index`, into a chunk.

        first_id: the id of the first row where there is no column of ids. Returns None where a
        value is not plain or is refused: the rows are then for parse_row.
        """
        try:
            return self._parse_columns(columns, numbers, first_id)
        except _NotPlainError:
            return None

    def _parse_columns(
        self, columns: Mapping[str, Any], numbers: Ints, first_id: int
    ) -> ListedChunk:
        count = len(numbers)
        texts = {}
        for kind in ("path", "key", "region"):
            if kind in columns:
                text = _read_texts(columns[kind])
                is_empty = pc.equal(text, "")
                _expect(kind == "region" or not pc.any(is_empty).as_py())
                texts[kind] = pc.if_else(is_empty, None, text)
        lat = lon = np.full(count, np.nan)
        if "lat" in columns:
            lat = self._read_numbers(columns, "lat", 90.0)
            lon = self._read_numbers(columns, "lon", 180.0)
            is_unknown = np.isnan(lat)
            _expect(np.array_equal(is_unknown, np.isnan(lon)))
            _expect(not (self.needs_position and is_unknown.any()))
        headings = None
        if "heading" in columns:
            headings = self._read_numbers(columns, "heading", 360.0).astype(np.float32)
        return ListedChunk(
            numbers=numbers,
            ids=_read_ids(columns["id"]) if "id" in columns else np.arange(count) + first_id,
            lat=lat,
            lon=lon,
            splits=self._read_splits(columns.get("split"), count),
            headings=headings,
            texts=pa.table(texts),
        )

    def join_rows(self, numbers: Sequence[int], rows: Sequence[ListedRow]) -> ListedChunk:
        """Make a chunk of parsed rows."""
        texts = {"path": pa.array([row.path for row in rows], pa.string())}
        if "key" in self.index:
            texts["key"] = pa.array([row.key for row in rows], pa.string())
        if "region" in self.index:
            texts["region"] = pa.array([row.region for row in rows], pa.string())
        return ListedChunk(
            numbers=np.array(numbers, dtype=np.int64),
            ids=np.array([row.id for row in rows], dtype=np.int64),
            lat=np.array([row.lat for row in rows], dtype=np.float64),
            lon=np.array([row.lon for row in rows], dtype=np.float64),
            splits=np.array([SPLIT_CODES.get(row.split, 0) for row in rows], dtype=np.uint8),
            headings=np.array([row.heading for row in rows], dtype=np.float32),
            texts=pa.table(texts),
        )

    def _read_splits(self, column: Any, count: int) -> NDArray[np.uint8]:
        if column is None:
            return np.zeros(count, np.uint8)
        codes = pc.index_in(_read_texts(column), value_set=pa.array(list(SPLIT_CODES)))
        allowed = [SPLIT_CODES[name] for name in SPLITS[self.view]]
        found = np.asarray(pc.fill_null(codes, 255)).astype(np.uint8)
        _expect(np.isin(found, allowed).all())
        return found

    def _read_numbers(self, columns: Mapping[str, Any], kind: str, limit: float) -> Floats64:
        """Read numbers within a limit, NaN for null and for empty texts."""
        column = columns[kind]
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            column = _read_texts(column)
            column = pc.if_else(pc.equal(column, ""), None, column)
        try:
            values = self.numbers.parse_column(kind, column)
        except pa.ArrowInvalid as error:
            raise _NotPlainError from error
        # NaN that was given is not within the limit; null is neither inside nor outside
        inside = pc.less_equal(pc.abs(values), limit)
        _expect(pc.all(inside).as_py() is not False)
        return np.array(pc.fill_null(values, float("nan")))

    def parse_row(self, location: str, fields: Sequence[str], number: int) -> ListedRow:
        """Parse a row; `number` is its id when there is no column of ids. Raises InputError."""
        if len(fields) != len(self.names):
            raise InputError(
                f"{location} has {len(fields)} fields, but the header has {len(self.names)}"
            )
        values = {kind: fields[column].strip() for kind, column in self.index.items()}
        for kind in ("path", "key", "id"):
            if values.get(kind) == "":
                raise InputError(f"{location}: {self.name(kind)} is empty; give every row one")
        lat, lon = self._parse_position(location, values)
        split = values.get("split", "")
        if "split" in values and split not in SPLITS[self.view]:
            raise InputError(
                f"{location}: {self.name('split')}={split!r} is none of"
                f" {', '.join(SPLITS[self.view])}"
            )
        image_id = values.get("id", str(number))
        if not is_number(image_id):
            raise InputError(
                f"{location}: {self.name('id')}={image_id!r} is not a whole number, 0 or larger"
            )
        heading = self._parse_number(location, "heading", values.get("heading", ""))
        if heading is not None and not abs(heading) <= 360:
            raise InputError(
                f"{location}: {self.name('heading')}={heading} is not within -360..360;"
                " or leave it empty"
            )
        return ListedRow(
            id=int(image_id),
            path=values["path"],
            lat=lat,
            lon=lon,
            key=values.get("key", ""),
            split=split,
            region=values.get("region") or None,
            heading=heading,
        )

    def name(self, kind: str) -> str:
        """Return the user's name of a column."""
        return self.names[self.index[kind]]

    def _parse_number(self, location: str, kind: str, text: str) -> float | None:
        if not text:
            return None
        try:
            return self.numbers.parse(kind, text)
        except ValueError as error:
            hint = self.numbers.explain(kind, text)
            raise InputError(
                f"{location}: {self.name(kind)}={text!r} is not a number{hint}"
            ) from error

    def _parse_position(
        self, location: str, values: dict[str, str]
    ) -> tuple[float | None, float | None]:
        lat = self._parse_number(location, "lat", values.get("lat", ""))
        lon = self._parse_number(location, "lon", values.get("lon", ""))
        if lat is None or lon is None:
            if self.needs_position:
                raise InputError(
                    f"{location}: coordinates are empty; fill them in, or pair by --pair key"
                )
            if (lat, lon) != (None, None):
                raise InputError(
                    f"{location}: only one of {self.name('lat')} and {self.name('lon')} is given;"
                    " give both or leave both empty"
                )
        elif not is_position(lat, lon):
            hint = explain_position(lat, lon)
            if is_position(lon, lat):
                hint = "; latitude and longitude look swapped"
            raise InputError(
                f"{location}: {lat}, {lon} is not within -90..90 and -180..180 degrees{hint}"
            )
        return lat, lon


def _expect(is_plain: bool | np.bool_) -> None:
    if not is_plain:
        raise _NotPlainError


def _read_texts(column: Any) -> Any:
    """Return texts without spaces around them; "" for null."""
    return pc.utf8_trim_whitespace(pc.fill_null(column.cast(pa.string()), ""))


def _read_ids(column: Any) -> Ints:
    """Read whole numbers, 0 or larger, that parse_row accepts too."""
    if not pa.types.is_integer(column.type):
        column = _read_texts(column)
        _expect(pc.all(pc.match_substring_regex(column, "^[0-9]{1,18}$")).as_py() is not False)
    _expect(column.null_count == 0)
    ids = np.array(column.cast(pa.int64()))
    in_range: Bools = (ids >= 0) & (ids < 2**62)
    _expect(in_range.all())
    return ids
