"""Check the rows of a data set when it is opened or written: schema, ids, splits, coordinates.

Rows are read and checked in batches; what stays in memory of them is compact (ViewColumns). Errors
name the file, the row and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray.arrays import LOOKUP_ROWS, Ints, is_among
from s4g_ray.data.format.header import COPY_AGAIN, HEADER, DatasetPart, check_listing
from s4g_ray.data.image_table import View
from s4g_ray.data.schema import OPTIONAL, SCHEMAS, SPLITS, with_optional
from s4g_ray.data.tables.view_columns import SPLIT_CODES, SemiPositives, ViewColumns
from s4g_ray.errors import InputError, StoreError
from s4g_ray.storage import files

BATCH_ROWS = 1 << 17  # rows that are checked at once
_CHECKED_OF_BOTH = ["id", "place_id", "uri", "offset", "length", "lat", "lon", "split"]
_CHECKED = {
    "references": _CHECKED_OF_BOTH,
    "queries": [*_CHECKED_OF_BOTH, "heading_deg", "semi_positives"],
}
# What stays in memory; lat and lon of queries are read again for the few that are evaluated.
_KEPT = {
    "references": ["id", "place_id", "lat", "lon"],
    "queries": ["id", "place_id", "heading_deg"],
}
_Rule = tuple[str, str | None, Any]  # reason, column that the message shows, faulty[n]


class _Fault(NamedTuple):
    """The first row that breaks a rule, and the number of rows that do."""

    location: str
    reason: str
    num_rows: int

    def error(self) -> InputError:
        others = f"; {self.num_rows - 1} more such rows" if self.num_rows > 1 else ""
        return InputError(f"{self.location}: {self.reason}{others}")


class _Faults:
    """The faults found in batches, by the number of their rule."""

    def __init__(self) -> None:
        self._found: dict[int, _Fault] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, location: str, number: int, reason: str, num_rows: int) -> None:
        """Count rows that break a rule; the first location stays."""
        known = self._found.get(number, _Fault(location, reason, 0))
        self._found[number] = known._replace(num_rows=known.num_rows + num_rows)

    def raise_first(self) -> None:
        """Raise InputError for the first rule that a row breaks."""
        if self._found:
            raise self._found[min(self._found)].error()


class ViewCheck:
    """Checks the rows of one view, batch by batch, in the order of their files."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.schema: pa.Schema | None = None  # of the first file
        self._files: list[str] = []
        self._first_rows: list[int] = []  # of each file
        self._num_rows = 0
        self._faults_of_ids = _Faults()
        self._faults = _Faults()
        self._chunks: dict[str, list[NDArray[Any]]] = {
            name: [] for name in [*_KEPT[view], "split", "semi_rows", "semi_lengths", "semi_places"]
        }
        self._columns: dict[str, NDArray[Any]] = {}

    @property
    def is_faulty(self) -> bool:
        """Whether a row is refused already."""
        return bool(self._faults_of_ids or self._faults)

    def begin_file(self, file: str) -> None:
        """Count the rows that follow as those of this file."""
        self._files.append(file)
        self._first_rows.append(self._num_rows)

    def read_files(self, uri: str, parts: Sequence[DatasetPart]) -> tuple[list[str], Any]:
        """Check all parts of a data set's view; return their paths and their file system.

        Raises InputError for a part that is missing, added or altered, and for a wrong schema.
        """
        check_listing(uri, self.view, parts)
        filesystem, path = files.filesystem_of(uri)
        paths = [f"{path}/{part.name}" for part in parts]
        for file, part in zip(paths, parts, strict=True):
            self.begin_file(file)
            self._read_file(filesystem, file)
            found = self._num_rows - self._first_rows[-1]
            if found != part.rows:
                raise InputError(
                    f"{file} holds {found:,} rows, but {HEADER} says {part.rows:,}: it was"
                    f" altered; {COPY_AGAIN}"
                )
        return paths, filesystem

    def _read_file(self, filesystem: Any, file: str) -> None:
        try:
            with (
                filesystem.open(file, "rb") as stream,
                pq.ParquetFile(stream, pre_buffer=True) as parquet,
            ):
                schema = parquet.schema_arrow
                _check_schema(file, schema, SCHEMAS[self.view])
                _check_optional(file, schema, OPTIONAL[self.view])
                self.schema = self.schema or with_optional(schema, self.view)
                names = list(_CHECKED[self.view])
                names += [name for name in OPTIONAL[self.view].names if name in schema.names]
                if not _may_hold_nulls(parquet.metadata, "uri"):
                    names.remove("uri")
                for batch in parquet.iter_batches(BATCH_ROWS, columns=names):
                    self.add(batch)
        except StoreError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{file} is not a readable Parquet file: {error}") from error

    def add(self, batch: pa.RecordBatch) -> None:
        """Check a batch of rows of the current file, with at most BATCH_ROWS rows."""
        for faults, rules in (
            (self._faults_of_ids, _check_ids(batch)),
            (self._faults, self._check_values(batch)),
        ):
            for number, (reason, column, faulty) in enumerate(rules):
                rows = np.flatnonzero(pc.fill_null(faulty, False))
                if len(rows):
                    row = int(rows[0])
                    value = f" ({column}={batch[column][row].as_py()!r})" if column else ""
                    location = f"{self._locate(self._num_rows + row)}{value}"
                    faults.add(location, number, reason, len(rows))
        self._keep(batch)
        self._num_rows += batch.num_rows

    def _check_values(self, batch: pa.RecordBatch) -> Iterator[_Rule]:
        allowed = SPLITS[self.view]
        known = pc.is_in(batch["split"], value_set=pa.array(allowed))
        yield f"split is none of {', '.join(allowed)}", "split", pc.invert(known)
        yield from _check_coordinates(batch)
        if self.view == "queries":
            yield from _check_query_columns(batch)
        elif "size_m" in batch.schema.names:
            size = batch["size_m"]
            is_good = pc.and_(pc.is_finite(size), pc.greater(size, 0))
            reason = "size_m is not above 0; give metres, or null where unknown"
            yield reason, "size_m", pc.invert(is_good)
        offset = batch["offset"]
        length = batch["length"]
        yield (
            "only one of offset and length is given; give both or neither",
            None,
            pc.not_equal(pc.is_null(offset), pc.is_null(length)),
        )
        yield (
            "offset is below 0 or length below 1",
            None,
            pc.or_(pc.less(offset, 0), pc.less(length, 1)),
        )

    def _keep(self, batch: pa.RecordBatch) -> None:
        for name in _KEPT[self.view]:
            empty = -1 if pa.types.is_integer(batch[name].type) else float("nan")
            column = pc.fill_null(batch[name], pa.scalar(empty, batch[name].type))
            self._chunks[name].append(np.array(column))
        codes = pc.index_in(batch["split"], value_set=pa.array(list(SPLIT_CODES)))
        self._chunks["split"].append(np.asarray(pc.fill_null(codes, 0)).astype(np.uint8))
        if self.view == "queries":
            rows, lengths, places = _split_lists(batch["semi_positives"])
            if len(rows):
                self._chunks["semi_rows"].append(rows + self._num_rows)
                self._chunks["semi_lengths"].append(lengths)
                self._chunks["semi_places"].append(places)

    def finish(self) -> None:
        """Raise InputError for the first rule that a row breaks, repeated ids included."""
        self._faults_of_ids.raise_first()
        for name in list(self._chunks):
            # one after the other: at most one column is in memory twice
            chunks = self._chunks.pop(name)
            kind = np.float64 if name in ("lat", "lon") else np.int64
            self._columns[name] = np.concatenate(chunks) if chunks else np.zeros(0, kind)
        self._check_unique_ids()
        self._faults.raise_first()

    def _check_unique_ids(self) -> None:
        ids = self._columns["id"]
        if _ascends(ids):
            return
        ordered = np.sort(ids)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(repeated):
            return
        earlier, later = np.flatnonzero(ids == repeated[0])[:2]
        raise InputError(
            f"{self._locate(int(later))}: id {repeated[0]} is already used at"
            f" {self._locate(int(earlier))}; give each row its own"
        )

    def check_train_places(self, references: ViewCheck) -> None:
        """Raise InputError for the first train query whose place has no train reference.

        Both views are finished, and their columns are not taken yet.
        """
        rows, places = self._find_train_places()
        unmatched = ~is_among(places, np.sort(references._find_train_places()[1]))
        if not unmatched.any():
            return
        row = int(rows[unmatched][0])
        place = places[unmatched][0]
        raise InputError(
            f"{self._locate(row)}: train query of place_id {place}, which has no train reference"
            f" ({int(unmatched.sum())} such queries); add the reference or drop the query"
        )

    def _find_train_places(self) -> tuple[Ints, Ints]:
        """Return the row numbers of split train, and the place of each."""
        rows = np.flatnonzero(self._columns["split"] == SPLIT_CODES["train"])
        return rows, self._columns["place_id"][rows]

    def take_columns(self) -> ViewColumns:
        """Return the columns of a finished view, sorted by id, and keep none."""
        columns = self._columns
        self._columns = {}
        rows = columns.pop("semi_rows")
        lengths = columns.pop("semi_lengths")
        places = columns.pop("semi_places")
        semi = SemiPositives.from_lengths(columns["id"][rows], lengths, places)
        if not _ascends(columns["id"]):
            order = np.argsort(columns["id"])
            for name in list(columns):
                columns[name] = columns[name][order]
            semi = semi.take(np.argsort(semi.query_ids))
        headings = columns.get("heading_deg")
        if headings is not None and np.isnan(headings).all():
            columns["heading_deg"] = np.broadcast_to(np.float32(np.nan), len(headings))
        splits = columns.pop("split")
        return ViewColumns(splits, columns, semi if self.view == "queries" else None)

    def _locate(self, row: int) -> str:
        """Return the file of a row of the view and the row's number there, for messages."""
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return f"{self._files[number]}, row {row - self._first_rows[number]}"


def _check_ids(batch: pa.RecordBatch) -> Iterator[_Rule]:
    for name in ("id", "place_id", "uri", "split"):
        # without statistics of nulls in its file, uri is read
        faulty = pc.is_null(batch[name]) if name in batch.schema.names else pa.array([], pa.bool_())
        yield f"{name} is null; give every row one", None, faulty
    for name in ("id", "place_id"):
        yield f"{name} is negative; number from 0", name, pc.less(batch[name], 0)


def _check_coordinates(batch: pa.RecordBatch) -> Iterator[_Rule]:
    lat = batch["lat"]
    lon = batch["lon"]
    yield (
        "only one of lat and lon is given; give both or neither",
        None,
        pc.not_equal(pc.is_null(lat), pc.is_null(lon)),
    )
    for name, column, limit in (("lat", lat, 90.0), ("lon", lon, 180.0)):
        inside = pc.and_(pc.is_finite(column), pc.less_equal(pc.abs(column), limit))
        reason = (
            f"{name} is not within -{limit:g}..{limit:g}; use WGS84 degrees, or null where unknown"
        )
        yield reason, name, pc.invert(inside)


def _check_query_columns(batch: pa.RecordBatch) -> Iterator[_Rule]:
    heading = batch["heading_deg"]
    inside = pc.and_(pc.is_finite(heading), pc.less_equal(pc.abs(heading), 360.0))
    yield (
        "heading_deg is not within -360..360; use degrees, or null where unknown",
        "heading_deg",
        pc.invert(inside),
    )
    lists = batch["semi_positives"]
    places = pc.list_flatten(lists)
    is_faulty = np.asarray(pc.fill_null(pc.less(places, 0), True), dtype=bool)
    rows = np.repeat(np.arange(batch.num_rows), _count_lists(lists))
    faulty = np.bincount(rows[is_faulty], minlength=batch.num_rows) > 0
    reason = "semi_positives holds a null or a negative place_id; leave it out"
    yield reason, None, pa.array(faulty)


def _count_lists(lists: Any) -> Ints:
    """Return the length of each list, 0 for null."""
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)


def _split_lists(lists: Any) -> tuple[Ints, Ints, Ints]:
    """Return the rows that have a list with values, the length of each, and all values."""
    lengths = _count_lists(lists)
    rows = np.flatnonzero(lengths)
    values = np.array(pc.fill_null(pc.list_flatten(lists), -1))
    return rows, lengths[rows], values


def _ascends(ids: Ints) -> bool:
    """Return whether ids[N] ascend strictly."""
    return all(
        bool((part[1:] > part[:-1]).all())
        for start in range(0, len(ids), LOOKUP_ROWS)
        for part in [ids[start : start + LOOKUP_ROWS + 1]]
    )


def _may_hold_nulls(metadata: Any, name: str) -> bool:
    """Return whether the statistics of a file leave nulls in a column possible."""
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            if column.path_in_schema == name:
                statistics = column.statistics
                known = statistics is not None and statistics.has_null_count
                if not known or statistics.null_count > 0:
                    return True
    return False


def _check_schema(file: str, found: pa.Schema, wanted: pa.Schema) -> None:
    missing = [f"{field.name} ({field.type})" for field in wanted if field.name not in found.names]
    if missing:
        raise InputError(
            f"{file}: missing columns {', '.join(missing)}; found {', '.join(found.names)}"
        )
    for field in wanted:
        kind = found.field(field.name).type
        if kind != field.type:
            raise InputError(f"{file}: column {field.name!r} is {kind}, but must be {field.type}")


def _check_optional(file: str, found: pa.Schema, optional: pa.Schema) -> None:
    for field in optional:
        if field.name in found.names and found.field(field.name).type != field.type:
            kind = found.field(field.name).type
            raise InputError(f"{file}: column {field.name!r} is {kind}, but must be {field.type}")
