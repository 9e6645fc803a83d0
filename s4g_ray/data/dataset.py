"""Open, validate and write canonical data sets, and read their rows.

GeoDataset holds no paths: rows are read from Parquet when asked for. The columns that validation
has read stay in memory until they are released.
"""

from __future__ import annotations

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
from s4g_ray.config.data_schema import AS_WRITTEN, ImageOptions
from s4g_ray.data.format.header import CORRECT_PATH, HEADER, DatasetHeader
from s4g_ray.data.format.image_paths import find_root, list_prefixes, relate
from s4g_ray.data.format.rows_digest import RowsDigest
from s4g_ray.data.image_table import VIEWS, ImageTable, View
from s4g_ray.data.pairs import PairTable, join_pairs
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues
from s4g_ray.data.tables.arrow_texts import read_paths, read_texts, sort_by_id
from s4g_ray.data.tables.part_writer import PartWriter
from s4g_ray.data.tables.text_column import shrink
from s4g_ray.data.tables.view_columns import HeldColumns, SemiPositives
from s4g_ray.data.validation import ViewCheck
from s4g_ray.errors import InputError
from s4g_ray.storage import files

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
    images_root: str  # absolute: the folder that relative paths of images start from
    values: ImageValues  # how the values of the images become bytes
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
            uris=read_paths(table["uri"], self.images_root),
            offsets=_read_positions(table["offset"]),
            lengths=_read_positions(table["length"]),
            lat=_read_floats(table["lat"]),
            lon=_read_floats(table["lon"]),
            headings=_read_optional(table, "heading_deg"),
            sizes=_read_optional(table, "size_m"),
            regions=read_texts(pc.fill_null(table["region"], "")),
            values=self.values,
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


def open_dataset(
    uri: str, images: ImageOptions = AS_WRITTEN, *, remedy: str = CORRECT_PATH
) -> GeoDataset:
    """Open and validate a data set, reading its rows in batches.

    images: what is another than dataset.json says, as data.image_options. remedy: for a caller's
    user, where there is no data set. Checks the names, sizes
    and rows of the parts, the schema, unique ids, places and coordinates, and that each train query
    has a train reference. Raises InputError that names the file, the row and the remedy.
    """
    uri = files.absolute(uri)
    header = DatasetHeader.read(uri, remedy=remedy)
    checks: dict[View, ViewCheck] = {}
    sources: dict[View, pads.Dataset] = {}
    for view in VIEWS:
        check = ViewCheck(view)
        paths, filesystem = check.read_files(uri, header.parts_of(view))
        check.finish()
        checks[view] = check
        # with its schema, so that no file is opened for it
        sources[view] = pads.dataset(
            paths, schema=check.schema, filesystem=filesystem, format="parquet"
        )
    held = _take_columns(checks["references"], checks["queries"])
    return _make_dataset(uri, header, sources, held, images)


def _make_dataset(
    uri: str,
    header: DatasetHeader,
    sources: Mapping[View, pads.Dataset],
    held: HeldColumns,
    images: ImageOptions,
) -> GeoDataset:
    if images.root is None:
        root = find_root(uri, header.images_root)
    else:
        root = files.absolute(images.root)
    values = ImageValues(
        images.stretch or header.values.stretch, images.bands or header.values.bands
    ).check()
    return GeoDataset(
        uri=uri,
        name=header.name,
        fingerprint=_add_values(header.fingerprint, values),
        views=header.views,
        images_root=root,
        values=values,
        references=sources["references"],
        queries=sources["queries"],
        held=held,
    )


def _add_values(fingerprint: str, values: ImageValues) -> str:
    """Return the fingerprint of rows whose images are shown by these values."""
    if values == AS_STORED:
        return fingerprint
    return files.fingerprint(f"{fingerprint} {values}".encode())


def _take_columns(references: ViewCheck, queries: ViewCheck) -> HeldColumns:
    """Check the train queries of finished views, and return the columns of both."""
    queries.check_train_places(references)
    return HeldColumns({"references": references.take_columns(), "queries": queries.take_columns()})


def write_dataset(
    uri: str,
    references: Rows,
    queries: Rows,
    *,
    name: str,
    views: Mapping[str, str] | None = None,
    images_root: str | None = None,
    values: ImageValues = AS_STORED,
) -> GeoDataset:
    """Write rows as a canonical data set and return it; columns that may be null may be missing.

    References and queries are each a table or data frame, or an iterable of tables or record
    batches. An iterable is written as it comes, so that about a part of 10^6 rows is in memory, and
    50 bytes a place; the files and the fingerprint are those of the same rows in one table. The
    references are consumed first. Types are cast where nothing is lost (format/columns.py).
    `views` describes the images of each view in words. images_root: the folder that relative paths
    of images start from (None: the data set's own); absolute paths below it are stored relative.
    values: how images become bytes that hold others, or more bands than three.
    Raises InputError when the folder holds a data set already, for columns that do not fit, and
    where open_dataset would. dataset.json is written last, and only for valid rows: after any error
    none of the parts is left.
    """
    uri = files.absolute(uri)
    refuse_existing(uri)
    if views is not None and set(views) != set(VIEWS):
        raise InputError(f"views={dict(views)!r} must have the keys {' and '.join(VIEWS)}")
    root = uri if images_root is None else files.absolute(images_root)
    digest = RowsDigest(name)
    prefixes = list_prefixes(uri, root)
    writers = [PartWriter(files.join(uri, view), view, digest, prefixes) for view in VIEWS]
    try:
        for writer, rows in zip(writers, (references, queries), strict=True):
            writer.write(rows)
        held = _take_columns(*(writer.check for writer in writers))
    except BaseException:
        for writer in writers:
            writer.remove()
        raise
    header = DatasetHeader(
        name=name,
        fingerprint=digest.hexdigest(),
        counts={view: held.count_splits(view) for view in VIEWS},
        parts=tuple(part for writer in writers for part in writer.parts),
        views=dict(views or {}),
        images_root=relate(uri, root),
        values=values.check(),
    )
    header.write(uri)
    sources = {view: writer.open() for view, writer in zip(VIEWS, writers, strict=True)}
    return _make_dataset(uri, header, sources, held, AS_WRITTEN)


def refuse_existing(uri: str) -> None:
    """Raise InputError when a data set is already there, or a file is in the way of the folder."""
    if files.is_local(uri):
        for path in (Path(uri), *Path(uri).parents):
            if path.exists() and not path.is_dir():
                raise InputError(f"{uri} cannot be a folder: {path} is a file")
    if files.exists(files.join(uri, HEADER)):
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
