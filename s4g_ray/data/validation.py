"""Check the tables of a data set when it is opened or written: schema, ids, splits, coordinates.

Errors name the file, the row and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s4g_ray.arrays import Ints
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.data.schema import SCHEMAS, SPLITS, list_part_names, split_into_parts
from s4g_ray.errors import InputError, StoreError
from s4g_ray.storage import files

_CHECKED_OF_BOTH = ["id", "place_id", "uri", "offset", "length", "lat", "lon", "split"]
_CHECKED = {
    "references": _CHECKED_OF_BOTH,
    "queries": [*_CHECKED_OF_BOTH, "heading_deg", "semi_positives"],
}


@dataclass(frozen=True)
class CheckedColumns:
    """The columns that validation reads, and the file of each row."""

    view: View
    table: pa.Table
    files: list[str]
    first_rows: Ints  # of each file
    filesystem: Any = None

    @classmethod
    def from_table(cls, table: pa.Table, folder: str, view: View) -> CheckedColumns:
        """Take the columns of a table that is not written yet."""
        names, starts = zip(*split_into_parts(len(table)), strict=True)
        return cls(
            view,
            table.select(_CHECKED[view]),
            [files.join(folder, name) for name in names],
            np.array(starts),
        )

    @classmethod
    def read(cls, folder: str, view: View) -> CheckedColumns:
        """Read the columns from the files of a folder. Raises InputError for a wrong schema."""
        names = list_part_names(folder)
        if not names:
            raise InputError(
                f"{folder} holds no part-*.parquet; the data set is incomplete, make it again"
            )
        filesystem, path = files.filesystem_of(folder)
        paths = [f"{path}/{name}" for name in names]
        tables = [_read_checked(filesystem, file, view) for file in paths]
        ends = np.cumsum([len(table) for table in tables])
        first_rows = np.concatenate([[0], ends[:-1]])
        whole = pa.concat_tables(tables, promote_options="permissive")
        return cls(view, whole, paths, first_rows, filesystem)

    def at(self, row: int) -> str:
        """Return the file of a row of the whole table and the row's number there, for messages."""
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return f"{self.files[number]}, row {row - self.first_rows[number]}"

    def check(self) -> None:
        """Raise InputError for the first row that breaks a rule of the canonical data set."""
        for name in ("id", "place_id", "uri", "split"):
            self._refuse(pc.is_null(self.table[name]), f"{name} is null; give every row one")
        for name in ("id", "place_id"):
            self._refuse(pc.less(self.table[name], 0), f"{name} is negative; number from 0", name)
        self._check_unique_ids()
        allowed = SPLITS[self.view]
        known = pc.is_in(self.table["split"], value_set=pa.array(allowed))
        self._refuse(pc.invert(known), f"split is none of {', '.join(allowed)}", "split")
        self._check_coordinates()
        if self.view == "queries":
            self._check_queries()
        offset = self.table["offset"]
        length = self.table["length"]
        self._refuse(
            pc.not_equal(pc.is_null(offset), pc.is_null(length)),
            "only one of offset and length is given; give both or neither",
        )
        self._refuse(
            pc.or_(pc.less(offset, 0), pc.less(length, 1)), "offset is below 0 or length below 1"
        )

    def _check_unique_ids(self) -> None:
        ids = self.table["id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        repeated = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        if not len(repeated):
            return
        earlier = order[repeated[0]]
        later = order[repeated[0] + 1]
        raise InputError(
            f"{self.at(later)}: id {ids[later]} is already used at {self.at(earlier)};"
            " give each row its own"
        )

    def _check_coordinates(self) -> None:
        lat = self.table["lat"]
        lon = self.table["lon"]
        self._refuse(
            pc.not_equal(pc.is_null(lat), pc.is_null(lon)),
            "only one of lat and lon is given; give both or neither",
        )
        for name, column, limit in (("lat", lat, 90.0), ("lon", lon, 180.0)):
            inside = pc.and_(pc.is_finite(column), pc.less_equal(pc.abs(column), limit))
            reason = (
                f"{name} is not within -{limit:g}..{limit:g}; use WGS84 degrees,"
                " or null where unknown"
            )
            self._refuse(pc.invert(inside), reason, name)

    def _check_queries(self) -> None:
        heading = self.table["heading_deg"]
        inside = pc.and_(pc.is_finite(heading), pc.less_equal(pc.abs(heading), 360.0))
        self._refuse(
            pc.invert(inside),
            "heading_deg is not within -360..360; use degrees, or null where unknown",
            "heading_deg",
        )
        lists = self.table["semi_positives"].combine_chunks()
        places = pc.list_flatten(lists)
        faulty = np.asarray(pc.fill_null(pc.less(places, 0), True))
        if faulty.any():
            row = np.asarray(pc.list_parent_indices(lists))[faulty][0]
            raise InputError(
                f"{self.at(int(row))}: semi_positives holds a null or a negative place_id;"
                " leave it out"
            )

    def _refuse(self, faulty: Any, reason: str, column: str | None = None) -> None:
        """Raise InputError for the first faulty row, with the number of the others."""
        rows = np.flatnonzero(pc.fill_null(faulty, False).to_numpy())
        if not len(rows):
            return
        row = int(rows[0])
        value = ""
        if column:
            value = f" ({column}={self.table[column][row].as_py()!r})"
        others = ""
        if len(rows) > 1:
            others = f"; {len(rows) - 1} more such rows"
        raise InputError(f"{self.at(row)}{value}: {reason}{others}")


def check_columns(columns: Mapping[View, CheckedColumns]) -> None:
    """Check both views, and that every train query has a train reference. Raises InputError."""
    for view in VIEWS:
        columns[view].check()
    _check_train_places(columns["references"], columns["queries"])


def _check_train_places(references: CheckedColumns, queries: CheckedColumns) -> None:
    rows, places = _find_train_places(queries)
    _, reference_places = _find_train_places(references)
    unmatched = ~np.isin(places, reference_places)
    if not unmatched.any():
        return
    row = int(rows[unmatched][0])
    place = places[unmatched][0]
    raise InputError(
        f"{queries.at(row)}: train query of place_id {place}, which has no train reference"
        f" ({int(unmatched.sum())} such queries); add the reference or drop the query"
    )


def _find_train_places(columns: CheckedColumns) -> tuple[Ints, Ints]:
    """Return the row numbers of split train, and the place of each."""
    rows = np.flatnonzero(pc.equal(columns.table["split"], "train").to_numpy())
    return rows, columns.table["place_id"].to_numpy()[rows]


def _read_checked(filesystem: Any, file: str, view: View) -> pa.Table:
    """Read the columns of a file that validation needs. Raises InputError for a wrong schema."""
    try:
        with (
            filesystem.open(file, "rb") as stream,
            pq.ParquetFile(stream, pre_buffer=True) as parquet,
        ):
            _check_schema(file, parquet.schema_arrow, SCHEMAS[view])
            return parquet.read(columns=_CHECKED[view])
    except StoreError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is not a readable Parquet file: {error}") from error


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
