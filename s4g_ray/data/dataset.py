"""The canonical data set: schema, writing, opening with validation, and what training reads from it."""

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

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.image_table import VIEWS, ImageTable, View
from s4g_ray.data.pairs import PairTable, pairs_by_place
from s4g_ray.data.schema import FORMAT, ROWS_PER_PART, SCHEMAS, list_part_names, split_into_parts
from s4g_ray.data.validation import CheckedColumns, check_columns
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.s3_retries import reraise_outage


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
        headings = (
            _floats(table["heading_deg"]) if view == "queries" else np.full(len(table), np.nan)
        )
        return ImageTable(
            table["id"].to_numpy(),
            table["place_id"].to_numpy(),
            [files.join(self.uri, uri) for uri in table["uri"].to_pylist()],
            table["offset"].to_pylist(),
            table["length"].to_pylist(),
            _floats(table["lat"]),
            _floats(table["lon"]),
            headings,
            table["region"].to_pylist(),
        )

    def columns(
        self, view: View, splits: Sequence[str], names: Sequence[str]
    ) -> list[NDArray[Any]]:
        """Some numeric columns of the rows of some splits, sorted by id, NaN for null: no image's path is read."""
        source: pads.Dataset = getattr(self, view)
        chosen = pc.field("split").isin(list(splits))
        table = source.to_table(columns=list(dict.fromkeys(["id", *names])), filter=chosen).sort_by(
            "id"
        )
        return [table[name].to_numpy() for name in names]

    def semi_positives(self, split: str) -> dict[int, Ints]:
        """The semi-positive place_ids of the queries of a split that have any, by query id."""
        chosen = (pc.field("split") == split) & (
            pc.list_value_length(pc.field("semi_positives")) > 0
        )
        table = self.queries.to_table(
            columns=["id", "semi_positives"], filter=chosen
        ).combine_chunks()
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
        return PairTable(
            query_ids[found.rows], reference_ids[found.columns], query_places[found.rows]
        )


def open_dataset(uri: str) -> GeoDataset:
    """Open and validate a data set (schema, unique ids, no null place, coordinates, train places matched).

    Raises InputError that names the file, the row and the remedy.
    """
    uri = files.absolute(uri)
    try:
        header = files.read_json(files.join(uri, "dataset.json"))
    except FileNotFoundError as error:
        raise InputError(
            f"no data set at {uri}: dataset.json is missing; make one with `s4g convert` or dataset.write_dataset"
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
    columns = {view: CheckedColumns.read(files.join(uri, view), view) for view in VIEWS}
    check_columns(columns)
    sources = [
        pads.dataset(c.files, filesystem=c.filesystem, format="parquet") for c in columns.values()
    ]
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
    uri = files.absolute(uri)
    refuse_existing(uri)
    if views is not None and set(views) != set(VIEWS):
        raise InputError(f"views={dict(views)!r} must have the keys {' and '.join(VIEWS)}")
    tables = {
        view: _conform(table, view)
        for view, table in zip(VIEWS, (references, queries), strict=True)
    }
    columns = {
        view: CheckedColumns.of_table(tables[view], files.join(uri, view), view) for view in VIEWS
    }
    check_columns(columns)
    hashes: list[bytes] = []
    for view in VIEWS:
        folder = files.join(uri, view)
        for part in list_part_names(
            folder
        ):  # of an attempt that was cut off; other files are not ours
            files.remove(files.join(folder, part))
        for part, start in split_into_parts(len(tables[view])):
            buffer = io.BytesIO()
            pq.write_table(tables[view].slice(start, ROWS_PER_PART), buffer)
            files.write_bytes(files.join(folder, part), buffer.getvalue())
            hashes.append(buffer.getvalue())
    splits = {view: pc.value_counts(tables[view]["split"]).to_pylist() for view in VIEWS}
    header = {
        "format": FORMAT,
        "version": 1,
        "name": name,
        "fingerprint": files.fingerprint(*hashes),
        "counts": {view: {row["values"]: row["counts"] for row in splits[view]} for view in VIEWS},
        "views": dict(views or {}),
    }
    files.write_json(files.join(uri, "dataset.json"), header)
    return open_dataset(uri)


def refuse_existing(uri: str) -> None:
    """Raises InputError when a data set is already there, or nothing can be, for a file is in the way."""
    paths = [Path(uri), *Path(uri).parents] if files.is_local(uri) else []
    for path in paths:
        if path.exists() and not path.is_dir():
            raise InputError(f"{uri} cannot be a folder: {path} is a file")
    if files.exists(files.join(uri, "dataset.json")):
        raise InputError(f"{uri} holds a data set already; remove it or choose another folder")


def _conform(table: pa.Table, view: View) -> pa.Table:
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


def _floats(column: pa.ChunkedArray) -> Floats64:
    return np.asarray(pc.fill_null(column, float("nan")).to_numpy(), dtype=np.float64)
