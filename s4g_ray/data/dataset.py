"""Open, validate and write canonical data sets, and read their rows.

GeoDataset holds no table: columns and rows are read from Parquet when asked for.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64, Ints, Rows32
from s4g_ray.data.image_table import VIEWS, ImageTable, View
from s4g_ray.data.pairs import PairTable, join_pairs
from s4g_ray.data.schema import FORMAT, ROWS_PER_PART, SCHEMAS, list_part_names, split_into_parts
from s4g_ray.data.tables.arrow_texts import read_paths, read_texts, sort_by_id
from s4g_ray.data.tables.text_column import shrink
from s4g_ray.data.validation import CheckedColumns, check_columns
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage


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
        """Read the image rows of the given splits, sorted by id, into memory.

        A process that keeps the table of a large data set opens it with open_image_tables
        (tables/node_cache.py), which shares the memory with the other processes of its node.
        """
        columns = ["id", "place_id", "uri", "offset", "length", "lat", "lon", "region"]
        if view == "queries":
            columns.append("heading_deg")
        source: pads.Dataset = getattr(self, view)
        table = source.to_table(columns=columns, filter=pc.field("split").isin(list(splits)))
        table = sort_by_id(table)
        if view == "queries":
            headings = _read_floats(table["heading_deg"]).astype(np.float32)
        else:
            headings = np.broadcast_to(np.float32(np.nan), len(table))
        return ImageTable(
            ids=table["id"].to_numpy(),
            place_ids=table["place_id"].to_numpy(),
            uris=read_paths(table["uri"], self.uri),
            offsets=_read_positions(table["offset"]),
            lengths=_read_positions(table["length"]),
            lat=_read_floats(table["lat"]),
            lon=_read_floats(table["lon"]),
            headings=headings,
            regions=read_texts(pc.fill_null(table["region"], "")),
        )

    def columns(
        self, view: View, splits: Sequence[str], names: Sequence[str]
    ) -> list[NDArray[Any]]:
        """Read numeric columns of the given splits, sorted by id, NaN for null.

        The paths of images are not read.
        """
        source: pads.Dataset = getattr(self, view)
        chosen = pc.field("split").isin(list(splits))
        wanted = list(dict.fromkeys(["id", *names]))
        table = sort_by_id(source.to_table(columns=wanted, filter=chosen))
        return [table[name].to_numpy() for name in names]

    def query_regions(self, ids: Ints) -> NDArray[np.str_] | None:
        """Read the regions of the queries ids[n]; "" for null, None where none has a region."""
        table = self.queries.to_table(columns=["id", "region"], filter=pc.field("id").isin(ids))
        table = sort_by_id(table)
        names = np.array(pc.fill_null(table["region"], "").to_pylist(), dtype=str)
        if not (names != "").any():
            return None
        return np.asarray(names[np.searchsorted(table["id"].to_numpy(), ids)])

    def semi_positives(self, split: str) -> dict[int, Ints]:
        """Read the semi-positive place_ids of the queries of a split that have any, by query id."""
        in_split = pc.field("split") == split
        has_any = pc.list_value_length(pc.field("semi_positives")) > 0
        table = self.queries.to_table(columns=["id", "semi_positives"], filter=in_split & has_any)
        if not len(table):
            return {}
        table = table.combine_chunks()
        lists = table["semi_positives"].chunk(0)
        ends = np.cumsum(pc.list_value_length(lists).to_numpy())
        values = np.split(lists.flatten().to_numpy(), ends[:-1])
        return dict(zip(table["id"].to_pylist(), values, strict=True))

    def pairs(self, split: str) -> PairTable:
        """Pair each query with each reference of its place within a split, sorted by query id."""
        query_ids, query_places = self.columns("queries", [split], ["id", "place_id"])
        reference_ids, reference_places = self.columns("references", [split], ["id", "place_id"])
        return join_pairs(query_ids, query_places, reference_ids, reference_places)


def open_dataset(uri: str) -> GeoDataset:
    """Open and validate a data set.

    Checks the schema, unique ids, places and coordinates, and that each train query has a train
    reference. Raises InputError that names the file, the row and the remedy.
    """
    uri = files.absolute(uri)
    header = _read_header(uri)
    columns = {view: CheckedColumns.read(files.join(uri, view), view) for view in VIEWS}
    check_columns(columns)
    sources = [
        pads.dataset(checked.files, filesystem=checked.filesystem, format="parquet")
        for checked in columns.values()
    ]
    return GeoDataset(uri, header["name"], header["fingerprint"], header.get("views", {}), *sources)


def _read_header(uri: str) -> dict[str, Any]:
    """Read dataset.json. Raises InputError when it is missing, damaged or of another format."""
    try:
        header = files.read_json(files.join(uri, "dataset.json"))
    except FileNotFoundError as error:
        raise InputError(
            f"no data set at {uri}: dataset.json is missing; make one with `s4g convert` or"
            " write_dataset"
        ) from error
    except RunError as error:
        reraise_outage(error)
        raise InputError(str(error)) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != 1:
        raise InputError(f"{uri}/dataset.json is not of format {FORMAT!r}, version 1")
    missing = [key for key in ("name", "fingerprint") if not isinstance(header.get(key), str)]
    if missing:
        raise InputError(
            f"{uri}/dataset.json lacks {' and '.join(missing)}; make the data set again"
        )
    return header


def write_dataset(
    uri: str,
    references: pa.Table,
    queries: pa.Table,
    *,
    name: str,
    views: Mapping[str, str] | None = None,
) -> GeoDataset:
    """Write tables as a canonical data set, then open it; columns that may be null may be missing.

    `views` describes the images of each view in words. Raises InputError when the folder holds a
    data set already, and where open_dataset would. dataset.json is written last, and only for valid
    tables.
    """
    uri = files.absolute(uri)
    refuse_existing(uri)
    if views is not None and set(views) != set(VIEWS):
        raise InputError(f"views={dict(views)!r} must have the keys {' and '.join(VIEWS)}")
    given = dict(zip(VIEWS, (references, queries), strict=True))
    tables = {view: _conform(table, view) for view, table in given.items()}
    columns = {}
    for view in VIEWS:
        columns[view] = CheckedColumns.from_table(tables[view], files.join(uri, view), view)
    check_columns(columns)
    contents: list[bytes] = []
    for view in VIEWS:
        contents.extend(_write_parts(files.join(uri, view), tables[view]))
    counts = {}
    for view in VIEWS:
        rows = pc.value_counts(tables[view]["split"]).to_pylist()
        counts[view] = {row["values"]: row["counts"] for row in rows}
    header = {
        "format": FORMAT,
        "version": 1,
        "name": name,
        "fingerprint": files.fingerprint(*contents),
        "counts": counts,
        "views": dict(views or {}),
    }
    files.write_json(files.join(uri, "dataset.json"), header)
    return open_dataset(uri)


def _write_parts(folder: str, table: pa.Table) -> list[bytes]:
    """Write a table in parts and return their contents.

    Removes parts that an interrupted attempt left; other files in the folder stay.
    """
    for name in list_part_names(folder):
        files.remove(files.join(folder, name))
    contents = []
    for name, start in split_into_parts(len(table)):
        buffer = io.BytesIO()
        pq.write_table(table.slice(start, ROWS_PER_PART), buffer)
        files.write_bytes(files.join(folder, name), buffer.getvalue())
        contents.append(buffer.getvalue())
    return contents


def refuse_existing(uri: str) -> None:
    """Raise InputError when a data set is already there, or a file is in the way of the folder."""
    if files.is_local(uri):
        for path in (Path(uri), *Path(uri).parents):
            if path.exists() and not path.is_dir():
                raise InputError(f"{uri} cannot be a folder: {path} is a file")
    if files.exists(files.join(uri, "dataset.json")):
        raise InputError(f"{uri} holds a data set already; remove it or choose another folder")


def _conform(table: pa.Table, view: View) -> pa.Table:
    """Cast a table to the schema of its view, nulls for missing columns. Raises InputError."""
    columns = []
    for field in SCHEMAS[view]:
        if field.name in table.column_names:
            try:
                columns.append(table[field.name].cast(field.type))
            except pa.ArrowInvalid as error:
                raise InputError(
                    f"{view}: column {field.name!r} is not {field.type}: {error}"
                ) from error
        elif field.nullable:
            columns.append(pa.nulls(len(table), field.type))
        else:
            raise InputError(f"{view}: column {field.name!r} ({field.type}) is missing")
    return pa.table(columns, names=SCHEMAS[view].names)


def _read_floats(column: pa.ChunkedArray) -> Floats64:
    return np.asarray(pc.fill_null(column, float("nan")).to_numpy(), dtype=np.float64)


def _read_positions(column: pa.ChunkedArray) -> Ints | Rows32:
    """Read offsets or lengths, -1 for null; without memory of their own where all are null."""
    if column.null_count == len(column):
        return np.broadcast_to(np.int32(-1), len(column))
    return shrink(pc.fill_null(column, -1).to_numpy())
