"""The canonical data set: schema, writing, opening with validation, and what training reads from it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray import storage
from s4g_ray.errors import InputError, RunError, StoreError
from s4g_ray.object_store import raise_outage
from s4g_ray.ranking import pairs_by_place
from s4g_ray.sampler import PairTable

View = Literal["references", "queries"]
VIEWS: tuple[View, View] = ("references", "queries")
FORMAT = "s4g-dataset"
SPLITS = {"references": ("train", "val", "test", "gallery"), "queries": ("train", "val", "test")}
ROWS_PER_PART = 1_000_000

_COMMON = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("place_id", pa.int64(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
    pa.field("lat", pa.float64()),
    pa.field("lon", pa.float64()),
    pa.field("split", pa.string(), nullable=False),
    pa.field("region", pa.string()),
    pa.field("source_id", pa.string()),
]
SCHEMAS = {
    "references": pa.schema(_COMMON),
    "queries": pa.schema(
        [*_COMMON, pa.field("heading_deg", pa.float32()), pa.field("semi_positives", pa.list_(pa.int64()))]
    ),
}
_CHECKED_OF_BOTH = ["id", "place_id", "uri", "offset", "length", "lat", "lon", "split"]
_CHECKED = {"references": _CHECKED_OF_BOTH, "queries": [*_CHECKED_OF_BOTH, "heading_deg", "semi_positives"]}


@dataclass(frozen=True)
class ImageTable:
    """Where the images of some rows lie, in row order: arrays of N, coordinates and headings NaN where null."""

    ids: NDArray[np.int64]
    place_ids: NDArray[np.int64]
    uris: list[str]  # absolute, or s3://
    offsets: list[int | None]
    lengths: list[int | None]
    lat: NDArray[np.float64]
    lon: NDArray[np.float64]
    headings: NDArray[np.float64]  # degrees; NaN for references
    regions: list[str | None]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self.ids, kind="stable")

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers of ids[M]. Raises KeyError for an id that is not in the table."""
        position = np.searchsorted(self.ids, ids, sorter=self._order)
        rows = self._order[np.minimum(position, len(self) - 1)]
        if len(ids) and not np.array_equal(self.ids[rows], ids):
            raise KeyError(int(np.asarray(ids)[self.ids[rows] != ids][0]))
        return rows

    def take(self, index: NDArray[np.int64]) -> ImageTable:
        """The table of some rows, by number."""
        return ImageTable(
            self.ids[index],
            self.place_ids[index],
            [self.uris[i] for i in index],
            [self.offsets[i] for i in index],
            [self.lengths[i] for i in index],
            self.lat[index],
            self.lon[index],
            self.headings[index],
            [self.regions[i] for i in index],
        )


@dataclass(frozen=True)
class GeoDataset:
    """An opened, validated data set. Tables are read as needed, never all at once."""

    uri: str
    name: str
    fingerprint: str
    views: Mapping[str, str]
    references: pads.Dataset
    queries: pads.Dataset

    def table(self, view: View, splits: Sequence[str]) -> ImageTable:
        """The image rows of some splits, sorted by id."""
        columns = ["id", "place_id", "uri", "offset", "length", "lat", "lon", "region"]
        columns += ["heading_deg"] if view == "queries" else []
        source: pads.Dataset = getattr(self, view)
        table = source.to_table(columns=columns, filter=pc.field("split").isin(list(splits)))
        table = table.sort_by("id")
        headings = _floats(table["heading_deg"]) if view == "queries" else np.full(len(table), np.nan)
        return ImageTable(
            table["id"].to_numpy(),
            table["place_id"].to_numpy(),
            [storage.join(self.uri, uri) for uri in table["uri"].to_pylist()],
            table["offset"].to_pylist(),
            table["length"].to_pylist(),
            _floats(table["lat"]),
            _floats(table["lon"]),
            headings,
            table["region"].to_pylist(),
        )

    def columns(self, view: View, splits: Sequence[str], names: Sequence[str]) -> list[NDArray[Any]]:
        """Some numeric columns of the rows of some splits, sorted by id, NaN for null: no image's path is read."""
        source: pads.Dataset = getattr(self, view)
        chosen = pc.field("split").isin(list(splits))
        table = source.to_table(columns=list(dict.fromkeys(["id", *names])), filter=chosen).sort_by("id")
        return [table[name].to_numpy() for name in names]

    def semi_positives(self, split: str) -> dict[int, NDArray[np.int64]]:
        """The semi-positive place_ids of the queries of a split that have any, by query id."""
        chosen = (pc.field("split") == split) & (pc.list_value_length(pc.field("semi_positives")) > 0)
        table = self.queries.to_table(columns=["id", "semi_positives"], filter=chosen).combine_chunks()
        if not len(table):
            return {}
        lists = table["semi_positives"].chunk(0)
        ends = np.cumsum(pc.list_value_length(lists).to_numpy())
        values = np.split(lists.flatten().to_numpy(), ends[:-1])
        return dict(zip(table["id"].to_pylist(), values, strict=True))

    def pairs(self, split: str) -> PairTable:
        """One row for each query and each reference of its place within a split, sorted by query id."""
        query_ids, query_places = self.columns("queries", [split], ["id", "place_id"])
        reference_ids, reference_places = self.columns("references", [split], ["id", "place_id"])
        order = np.argsort(reference_places, kind="stable")
        reference_ids, reference_places = reference_ids[order], reference_places[order]
        found = pairs_by_place(np.arange(len(query_places)), query_places, reference_places)
        return PairTable(query_ids[found.rows], reference_ids[found.columns], query_places[found.rows])


def gallery_splits(split: str) -> list[str]:
    """The splits of references that the queries of a split are searched in."""
    return [split, "gallery"]


def open_dataset(uri: str) -> GeoDataset:
    """Open and validate a data set (schema, unique ids, no null place, coordinates, train places matched).

    Raises InputError that names the file, the row and the remedy.
    """
    uri = storage.absolute(uri)
    try:
        header = storage.read_json(storage.join(uri, "dataset.json"))
    except FileNotFoundError as error:
        raise InputError(
            f"no data set at {uri}: dataset.json is missing; make one with `s4g convert` or dataset.write_dataset"
        ) from error
    except RunError as error:
        raise_outage(error)
        raise InputError(str(error)) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != 1:
        raise InputError(f"{uri}/dataset.json is not of format {FORMAT!r}, version 1")
    missing = [key for key in ("name", "fingerprint") if not isinstance(header.get(key), str)]
    if missing:
        raise InputError(f"{uri}/dataset.json lacks {' and '.join(missing)}; make the data set again")
    columns = {view: _Columns.read(storage.join(uri, view), view) for view in VIEWS}
    _check(columns)
    sources = [pads.dataset(c.files, filesystem=c.filesystem, format="parquet") for c in columns.values()]
    return GeoDataset(uri, header["name"], header["fingerprint"], header.get("views", {}), *sources)


def write_dataset(
    uri: str,
    references: pa.Table,
    queries: pa.Table,
    *,
    name: str,
    views: Mapping[str, str] | None = None,
) -> GeoDataset:
    """Write tables as a canonical data set, then open it; columns that may be null may be left out.

    `views` says in words what the two kinds of image are. Raises InputError when a data set is already
    there, and for whatever open_dataset refuses; dataset.json is written last, and only for valid tables.
    """
    uri = storage.absolute(uri)
    refuse_existing(uri)
    if views is not None and set(views) != set(VIEWS):
        raise InputError(f"views={dict(views)!r} must have the keys {' and '.join(VIEWS)}")
    tables = {view: _conform(table, view) for view, table in zip(VIEWS, (references, queries), strict=True)}
    columns = {view: _Columns.of_table(tables[view], storage.join(uri, view), view) for view in VIEWS}
    _check(columns)
    hashes: list[bytes] = []
    for view in VIEWS:
        folder = storage.join(uri, view)
        for part in _part_names(folder):  # of an attempt that was cut off; other files are not ours
            storage.remove(storage.join(folder, part))
        for part, start in _parts(len(tables[view])):
            buffer = io.BytesIO()
            pq.write_table(tables[view].slice(start, ROWS_PER_PART), buffer)
            storage.write_bytes(storage.join(folder, part), buffer.getvalue())
            hashes.append(buffer.getvalue())
    splits = {view: pc.value_counts(tables[view]["split"]).to_pylist() for view in VIEWS}
    header = {
        "format": FORMAT,
        "version": 1,
        "name": name,
        "fingerprint": storage.fingerprint(*hashes),
        "counts": {view: {row["values"]: row["counts"] for row in splits[view]} for view in VIEWS},
        "views": dict(views or {}),
    }
    storage.write_json(storage.join(uri, "dataset.json"), header)
    return open_dataset(uri)


def refuse_existing(uri: str) -> None:
    """Raises InputError when a data set is already there, or nothing can be, for a file is in the way."""
    paths = [Path(uri), *Path(uri).parents] if storage.is_local(uri) else []
    for path in paths:
        if path.exists() and not path.is_dir():
            raise InputError(f"{uri} cannot be a folder: {path} is a file")
    if storage.exists(storage.join(uri, "dataset.json")):
        raise InputError(f"{uri} holds a data set already; remove it or choose another folder")


def _parts(rows: int) -> list[tuple[str, int]]:
    """File names of a table's parts, and the first row of each."""
    starts = range(0, max(rows, 1), ROWS_PER_PART)
    return [(f"part-{number:05d}.parquet", start) for number, start in enumerate(starts)]


def _part_names(folder: str) -> list[str]:
    return [name for name in storage.list_names(folder) if re.fullmatch(r"part-.*\.parquet", name)]


def _conform(table: pa.Table, view: View) -> pa.Table:
    columns = []
    for field in SCHEMAS[view]:
        if field.name in table.column_names:
            try:
                columns.append(table[field.name].cast(field.type))
            except pa.ArrowInvalid as error:
                raise InputError(f"{view}: column {field.name!r} is not {field.type}: {error}") from error
        elif field.nullable:
            columns.append(pa.nulls(len(table), field.type))
        else:
            raise InputError(f"{view}: column {field.name!r} ({field.type}) is missing")
    return pa.table(columns, names=SCHEMAS[view].names)


def _read_checked(filesystem: Any, file: str, view: View) -> pa.Table:
    """The columns of a file that validation reads, if its schema is right."""
    try:
        with filesystem.open(file, "rb") as stream, pq.ParquetFile(stream, pre_buffer=True) as parquet:
            _check_schema(file, parquet.schema_arrow, SCHEMAS[view])
            return parquet.read(columns=_CHECKED[view])
    except StoreError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is not a readable Parquet file: {error}") from error


@dataclass(frozen=True)
class _Columns:
    """The columns that validation reads, and the file of each row."""

    view: View
    table: pa.Table
    files: list[str]
    first_rows: NDArray[np.int64]  # of each file
    filesystem: Any = None

    @classmethod
    def of_table(cls, table: pa.Table, folder: str, view: View) -> _Columns:
        """Of a table that is still to be written."""
        names, starts = zip(*_parts(len(table)), strict=True)
        return cls(view, table.select(_CHECKED[view]), [storage.join(folder, name) for name in names], np.array(starts))

    @classmethod
    def read(cls, folder: str, view: View) -> _Columns:
        """Of the files of a folder."""
        names = _part_names(folder)
        if not names:
            raise InputError(f"{folder} holds no part-*.parquet; the data set is incomplete, make it again")
        filesystem, path = storage.filesystem_of(folder)
        files = [f"{path}/{name}" for name in names]
        tables = [_read_checked(filesystem, file, view) for file in files]
        first = np.cumsum([0, *(len(t) for t in tables)][:-1])
        return cls(view, pa.concat_tables(tables, promote_options="permissive"), files, first, filesystem)

    def at(self, row: int) -> str:
        """File and row of a row of the whole table, for messages."""
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return f"{self.files[number]}, row {row - self.first_rows[number]}"

    def check(self) -> None:
        for name in ("id", "place_id", "uri", "split"):
            self._refuse(pc.is_null(self.table[name]), f"{name} is null; give every row one")
        for name in ("id", "place_id"):
            self._refuse(pc.less(self.table[name], 0), f"{name} is negative; number from 0", name)
        ids = self.table["id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        repeated = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        if len(repeated):
            earlier, later = order[repeated[0]], order[repeated[0] + 1]
            raise InputError(
                f"{self.at(later)}: id {ids[later]} stands already at {self.at(earlier)}; give each row its own"
            )
        allowed = SPLITS[self.view]
        known = pc.is_in(self.table["split"], value_set=pa.array(allowed))
        self._refuse(pc.invert(known), f"split is none of {', '.join(allowed)}", "split")
        self._check_coordinates()
        if self.view == "queries":
            self._check_queries()
        offset, length = self.table["offset"], self.table["length"]
        self._refuse(
            pc.not_equal(pc.is_null(offset), pc.is_null(length)),
            "offset and length are given both or not at all",
        )
        self._refuse(pc.or_(pc.less(offset, 0), pc.less(length, 1)), "offset is below 0 or length below 1")

    def _check_coordinates(self) -> None:
        lat, lon = self.table["lat"], self.table["lon"]
        self._refuse(pc.not_equal(pc.is_null(lat), pc.is_null(lon)), "lat and lon are given both or not at all")
        for name, column, limit in (("lat", lat, 90.0), ("lon", lon, 180.0)):
            inside = pc.and_(pc.is_finite(column), pc.less_equal(pc.abs(column), limit))
            remedy = f"{name} is not within -{limit:g}..{limit:g}; use WGS84 degrees, or null where unknown"
            self._refuse(pc.invert(inside), remedy, name)

    def _check_queries(self) -> None:
        heading, semi = self.table["heading_deg"], self.table["semi_positives"].combine_chunks()
        inside = pc.and_(pc.is_finite(heading), pc.less_equal(pc.abs(heading), 360.0))
        self._refuse(pc.invert(inside), "heading_deg is not within -360..360; or null where unknown", "heading_deg")
        places = pc.list_flatten(semi)
        faulty = np.asarray(pc.fill_null(pc.less(places, 0), True))
        if faulty.any():
            row = np.asarray(pc.list_parent_indices(semi))[faulty][0]
            raise InputError(f"{self.at(int(row))}: semi_positives holds a null or a negative place_id; leave it out")

    def _refuse(self, faulty: Any, what: str, column: str | None = None) -> None:
        rows = np.flatnonzero(pc.fill_null(faulty, False).to_numpy())
        if len(rows):
            value = f" ({column}={self.table[column][int(rows[0])].as_py()!r})" if column else ""
            more = f"; {len(rows) - 1} more such rows" if len(rows) > 1 else ""
            raise InputError(f"{self.at(int(rows[0]))}{value}: {what}{more}")


def _check_schema(file: str, found: pa.Schema, wanted: pa.Schema) -> None:
    missing = [f"{field.name} ({field.type})" for field in wanted if field.name not in found.names]
    if missing:
        raise InputError(f"{file}: missing columns {', '.join(missing)}; found {', '.join(found.names)}")
    for field in wanted:
        if found.field(field.name).type != field.type:
            raise InputError(
                f"{file}: column {field.name!r} is {found.field(field.name).type}, but must be {field.type}"
            )


def _check(columns: Mapping[View, _Columns]) -> None:
    for view in VIEWS:
        columns[view].check()
    _check_train_places(columns["references"], columns["queries"])


def _check_train_places(references: _Columns, queries: _Columns) -> None:
    def train_places(columns: _Columns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows = np.flatnonzero(pc.equal(columns.table["split"], "train").to_numpy())
        return rows, columns.table["place_id"].to_numpy()[rows]

    rows, places = train_places(queries)
    lonely = ~np.isin(places, train_places(references)[1])
    if lonely.any():
        row, place = int(rows[lonely][0]), places[lonely][0]
        raise InputError(
            f"{queries.at(row)}: train query of place_id {place}, which has no train reference"
            f" ({int(lonely.sum())} such queries); add the reference or drop the query"
        )


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(pc.fill_null(column, float("nan")).to_numpy(), dtype=np.float64)
