"""Open, validate and write canonical data sets, and read their rows.

GeoDataset holds no paths: rows are read from Parquet when asked for. The columns that validation
has read stay in memory until they are released.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Floats64, Ints, Rows32
from s4g_ray.data.image_table import VIEWS, ImageTable, View
from s4g_ray.data.pairs import PairTable, join_pairs
from s4g_ray.data.schema import FORMAT
from s4g_ray.data.tables.arrow_texts import read_paths, read_texts, sort_by_id
from s4g_ray.data.tables.part_writer import PartWriter
from s4g_ray.data.tables.text_column import shrink
from s4g_ray.data.tables.view_columns import HeldColumns, SemiPositives
from s4g_ray.data.validation import ViewCheck
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage

# One table, or rows that come as an iterable of tables.
Rows: TypeAlias = pa.Table | Iterable[pa.Table | pa.RecordBatch]


@dataclass(frozen=True)
class GeoDataset:
    """An opened, validated data set. Tables are read as needed, never all at once.

    held: compact columns of all rows, from validation, until release_columns.
    """

    uri: str
    name: str
    fingerprint: str
    views: Mapping[str, str]
    references: pads.Dataset
    queries: pads.Dataset
    held: HeldColumns = field(default_factory=HeldColumns, repr=False, compare=False)

    def table(self, view: View, splits: Sequence[str]) -> ImageTable:
        """Read the image rows of the given splits, sorted by id, into memory.

        A process that keeps the table of a large data set opens it with open_image_tables
        (tables/node_cache.py), which shares the memory with the other processes of its node.
        """
        columns = ["id", "place_id", "uri", "offset", "length", "lat", "lon", "region"]
        columns.append("heading_deg" if view == "queries" else "size_m")
        source: pads.Dataset = getattr(self, view)
        table = source.to_table(columns=columns, filter=pc.field("split").isin(list(splits)))
        table = sort_by_id(table)
        return ImageTable(
            ids=table["id"].to_numpy(),
            place_ids=table["place_id"].to_numpy(),
            uris=read_paths(table["uri"], self.uri),
            offsets=_read_positions(table["offset"]),
            lengths=_read_positions(table["length"]),
            lat=_read_floats(table["lat"]),
            lon=_read_floats(table["lon"]),
            headings=_read_optional(table, "heading_deg"),
            sizes=_read_optional(table, "size_m"),
            regions=read_texts(pc.fill_null(table["region"], "")),
        )

    def columns(
        self, view: View, splits: Sequence[str], names: Sequence[str]
    ) -> list[NDArray[Any]]:
        """Read numeric columns of the given splits, sorted by id, NaN for null.

        The paths of images are not read; nor is the file, until release_columns is called, for the
        columns that validation has read. Callers must not change the arrays.
        """
        held = self.held.find(view, names)
        if held is not None:
            return held.read(splits, names)
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

    def semi_positives(self, split: str) -> SemiPositives:
        """Read the semi-positive places of the queries of a split that have any."""
        held = self.held.find("queries", ["id"])
        if held is not None:
            return held.find_semi_positives(split)
        in_split = pc.field("split") == split
        has_any = pc.list_value_length(pc.field("semi_positives")) > 0
        table = self.queries.to_table(columns=["id", "semi_positives"], filter=in_split & has_any)
        ids = table["id"].to_numpy()
        lengths = pc.list_value_length(table["semi_positives"]).to_numpy().astype(np.int64)
        places = pc.list_flatten(table["semi_positives"]).to_numpy()
        return SemiPositives.from_lengths(ids, lengths, places).take(np.argsort(ids))

    def count_splits(self, view: View) -> dict[str, int]:
        """Count the rows of each split of a view, without splits that have none."""
        held = self.held.find(view, ["id"])
        if held is not None:
            return held.count_splits()
        source: pads.Dataset = getattr(self, view)
        counts = pc.value_counts(source.to_table(columns=["split"])["split"])
        return {str(one["values"]): int(one["counts"].as_py()) for one in counts}

    def release_columns(self) -> None:
        """Free the columns that validation has read: 50 bytes a place. Later reads use the files.

        Callers keep the arrays that `columns` returned.
        """
        self.held.release()

    def pairs(self, split: str) -> PairTable:
        """Pair each query with each reference of its place within a split, sorted by query id."""
        query_ids, query_places = self.columns("queries", [split], ["id", "place_id"])
        reference_ids, reference_places = self.columns("references", [split], ["id", "place_id"])
        return join_pairs(query_ids, query_places, reference_ids, reference_places)


def open_dataset(uri: str) -> GeoDataset:
    """Open and validate a data set, reading its rows in batches.

    Checks the schema, unique ids, places and coordinates, and that each train query has a train
    reference. Raises InputError that names the file, the row and the remedy.
    """
    uri = files.absolute(uri)
    header = _read_header(uri)
    checks: dict[View, ViewCheck] = {}
    sources: dict[View, pads.Dataset] = {}
    for view in VIEWS:
        check = ViewCheck(view)
        paths, filesystem = check.read_files(files.join(uri, view))
        check.finish()
        checks[view] = check
        # with its schema, so that no file is opened for it
        sources[view] = pads.dataset(
            paths, schema=check.schema, filesystem=filesystem, format="parquet"
        )
    held = _take_columns(checks["references"], checks["queries"])
    return _make_dataset(uri, header, sources, held)


def _make_dataset(
    uri: str, header: dict[str, Any], sources: Mapping[View, pads.Dataset], held: HeldColumns
) -> GeoDataset:
    return GeoDataset(
        uri=uri,
        name=header["name"],
        fingerprint=header["fingerprint"],
        views=header.get("views", {}),
        references=sources["references"],
        queries=sources["queries"],
        held=held,
    )


def _take_columns(references: ViewCheck, queries: ViewCheck) -> HeldColumns:
    """Check the train queries of finished views, and return the columns of both."""
    queries.check_train_places(references)
    return HeldColumns({"references": references.take_columns(), "queries": queries.take_columns()})


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
    references: Rows,
    queries: Rows,
    *,
    name: str,
    views: Mapping[str, str] | None = None,
) -> GeoDataset:
    """Write rows as a canonical data set and return it; columns that may be null may be missing.

    References and queries are each a table, or an iterable of tables or record batches. An iterable
    is written as it comes, so that about a part of 10^6 rows is in memory, and 50 bytes a place;
    the files and the fingerprint are those of the same rows in one table. The references are
    consumed first. `views` describes the images of each view in words. Raises InputError when the
    folder holds a data set already, and where open_dataset would. dataset.json is written last, and
    only for valid rows: after any error none of the parts is left.
    """
    uri = files.absolute(uri)
    refuse_existing(uri)
    if views is not None and set(views) != set(VIEWS):
        raise InputError(f"views={dict(views)!r} must have the keys {' and '.join(VIEWS)}")
    digest = hashlib.sha256()
    writers = [PartWriter(files.join(uri, view), view, digest) for view in VIEWS]
    try:
        for writer, rows in zip(writers, (references, queries), strict=True):
            writer.write([rows] if isinstance(rows, pa.Table | pa.RecordBatch) else rows)
        held = _take_columns(*(writer.check for writer in writers))
    except BaseException:
        for writer in writers:
            writer.remove()
        raise
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "name": name,
        "fingerprint": digest.hexdigest(),
        "counts": {view: held.count_splits(view) for view in VIEWS},
        "views": dict(views or {}),
    }
    files.write_json(files.join(uri, "dataset.json"), header)
    sources = {view: writer.open() for view, writer in zip(VIEWS, writers, strict=True)}
    return _make_dataset(uri, header, sources, held)


def refuse_existing(uri: str) -> None:
    """Raise InputError when a data set is already there, or a file is in the way of the folder."""
    if files.is_local(uri):
        for path in (Path(uri), *Path(uri).parents):
            if path.exists() and not path.is_dir():
                raise InputError(f"{uri} cannot be a folder: {path} is a file")
    if files.exists(files.join(uri, "dataset.json")):
        raise InputError(f"{uri} holds a data set already; remove it or choose another folder")


def _read_floats(column: pa.ChunkedArray) -> Floats64:
    return np.asarray(pc.fill_null(column, float("nan")).to_numpy(), dtype=np.float64)


def _read_optional(table: pa.Table, name: str) -> Floats32:
    """Read a float column, NaN for null or without it.

    It has no memory of its own where all values are equal, or all are null.
    """
    if name not in table.column_names or table[name].null_count == len(table):
        return np.broadcast_to(np.float32(np.nan), len(table))
    values = _read_floats(table[name]).astype(np.float32)
    if len(values) and (values == values[0]).all():
        return np.broadcast_to(values[0], len(values))
    return values


def _read_positions(column: pa.ChunkedArray) -> Ints | Rows32:
    """Read offsets or lengths, -1 for null; without memory of their own where all are null."""
    if column.null_count == len(column):
        return np.broadcast_to(np.int32(-1), len(column))
    return shrink(pc.fill_null(column, -1).to_numpy())
