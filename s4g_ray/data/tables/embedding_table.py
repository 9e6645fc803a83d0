"""Read and write embedding tables: whole, part by part, or only the ids of a part.

A table has a part-*.parquet folder for each view, with columns id, place_id and embedding. Neither
Ray nor torch is imported.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s4g_ray.arrays import Floats32, Ints, is_among
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.errors import RunError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import (
    Manifest,
    Part,
    Stamp,
    open_published,
    read_part,
)
from s4g_ray.storage.parquet import open_parquet_part, refuse_extension_types

READERS = 16  # threads that read heads of parts; each waits for the file system nearly all the time
ROWS_PER_GROUP = 2048  # of a part's row groups, which readers of single rows read whole


@dataclass(frozen=True)
class EmbeddingTable:
    """ids[N], place_ids[N], vectors[N, D] float32, in the order of the parts."""

    ids: Ints
    place_ids: Ints
    vectors: Floats32

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def concatenate(cls, tables: Sequence[EmbeddingTable]) -> EmbeddingTable:
        """Return the rows of one or more tables, in their order."""
        return cls(
            np.concatenate([table.ids for table in tables]),
            np.concatenate([table.place_ids for table in tables]),
            np.concatenate([table.vectors for table in tables]),
        )

    def take(self, ids: Ints) -> EmbeddingTable:
        """Return the rows whose id is among `ids`, in the table's order."""
        return self.at(np.flatnonzero(np.isin(self.ids, ids)))

    def at(self, rows: Ints) -> EmbeddingTable:
        """Return the rows of these numbers, in their order."""
        return EmbeddingTable(self.ids[rows], self.place_ids[rows], self.vectors[rows])


def encode_part(ids: Ints, places: Ints, vectors: Floats32, dtype: str) -> bytes:
    """Encode a part of an embedding table as Parquet; vectors[n, D]."""
    values = pa.array(vectors.astype(dtype).ravel())
    table = pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "place_id": pa.array(places, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1]),
        }
    )
    return _encode_table(table)


def join_parts(pieces: Sequence[bytes]) -> bytes:
    """Join parts, as encode_part gives them, to one."""
    tables = [
        refuse_extension_types(pq.read_table(io.BytesIO(piece)), "a block of a part")
        for piece in pieces
    ]
    return _encode_table(pa.concat_tables(tables))


def _encode_table(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        table.combine_chunks(),
        buffer,
        row_group_size=ROWS_PER_GROUP,
        compression="none",
        use_dictionary=False,
        # read_groups reads a part in pieces: the checksum of the whole file does not help there
        write_page_checksum=True,
    )
    return buffer.getvalue()


def open_embeddings(folder: str, view: View, *, stamp: Stamp | None = None) -> Manifest:
    """Read the manifest of a published table, with the parts of one view.

    Raises RunError as read_embeddings does.
    """
    manifest = open_published(folder, "embeddings", stamp)
    parts = tuple(part for part in manifest.parts if part.name.startswith(f"{view}/"))
    if not parts:
        raise RunError(f"{folder} holds no {view}")
    return replace(manifest, parts=parts)


def read_embeddings(folder: str, view: View, *, stamp: Stamp | None = None) -> EmbeddingTable:
    """Read one view of a published table.

    Raises RunError when the table is unpublished, altered, or not made from `stamp`.
    """
    return EmbeddingTable.concatenate(list(read_embedding_parts(folder, view, stamp=stamp)))


def read_embedded_rows(
    folder: str, view: View, table: ImageTable, *, stamp: Stamp | None = None
) -> tuple[EmbeddingTable, ImageTable]:
    """Read the embeddings of the rows of an image table, and return those rows in the same order.

    Rows whose image was skipped are in neither. Other rows of the table are read part by part.
    Raises RunError as read_embeddings does.
    """
    parts = read_embedding_parts(folder, view, stamp=stamp)
    embedded = EmbeddingTable.concatenate([part.take(table.ids) for part in parts])
    return embedded, table.take(table.rows(embedded.ids))


def read_embedding_parts(
    folder: str, view: View, *, stamp: Stamp | None = None
) -> Iterator[EmbeddingTable]:
    """Read the parts of one view of a published table, one after the other.

    Raises RunError as read_embeddings does.
    """
    dim = None
    for part in open_embeddings(folder, view, stamp=stamp).parts:
        table = read_embedding_part(folder, part)
        if dim not in (None, table.vectors.shape[1]):
            raise RunError(
                f"{folder}/{part.name} holds D={table.vectors.shape[1]}, the parts before it {dim};"
                " embed the data set again"
            )
        dim = table.vectors.shape[1]
        yield table


def read_embedding_part(folder: str, part: Part) -> EmbeddingTable:
    """Read a part of a published table.

    Raises RunError when the part is missing, altered or of another schema.
    """
    uri = files.join(folder, part.name)
    contents = refuse_extension_types(pq.read_table(io.BytesIO(read_part(folder, part))), uri)
    return _decode(contents, uri)


def read_groups(folder: str, part: Part, groups: Sequence[int]) -> list[EmbeddingTable]:
    """Read some row groups of a part, each as a table; reads no other bytes but the footer.

    Raises RunError as read_embedding_part does. Altered bytes are found by the checksums of the
    pages that are read.
    """
    uri = files.join(folder, part.name)
    options = {"page_checksum_verification": True, "pre_buffer": True}
    with open_parquet_part(folder, part, **options) as parquet:
        tables = [refuse_extension_types(parquet.read_row_group(group), uri) for group in groups]
        return [_decode(table, uri) for table in tables]


def _decode(contents: pa.Table, uri: str) -> EmbeddingTable:
    table = contents.combine_chunks()
    dim, _ = _find_vector_type(table.schema, uri)
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(table), dim).astype(np.float32, copy=False)
    return EmbeddingTable(table["id"].to_numpy(), table["place_id"].to_numpy(), vectors)


class PartHead(NamedTuple):
    """A part without its vectors: ids[n], place_ids[n], and D and dtype of the vectors.

    group_rows: the number of rows of each row group, in order.
    """

    ids: Ints
    place_ids: Ints
    dim: int
    dtype: str
    group_rows: tuple[int, ...]


def read_part_head(folder: str, part: Part) -> PartHead:
    """Read only the ids and places of a part.

    Raises RunError as read_embedding_part does, but does not notice bytes altered in place.
    """
    uri = files.join(folder, part.name)
    with open_parquet_part(folder, part) as parquet:
        contents = parquet.read(columns=["id", "place_id"])
        table = refuse_extension_types(contents, uri)
        ids = table["id"].to_numpy()
        place_ids = table["place_id"].to_numpy()
        dim, dtype = _find_vector_type(parquet.schema_arrow, uri)
        counts = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
        return PartHead(ids, place_ids, dim, dtype, tuple(counts))


def read_heads(files: Iterable[tuple[str, Part]]) -> Iterator[PartHead]:
    """Read the heads of parts, each given with its folder, in order; READERS at a time.

    Raises RunError as read_part_head does.
    """
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(lambda file: read_part_head(*file), files)


def _find_vector_type(schema: pa.Schema, uri: str) -> tuple[int, str]:
    """Return D and dtype of a part's vectors.

    Raises RunError when the columns are not those of an embedding table.
    """
    columns = {field.name: field.type for field in schema}
    found = columns.get("embedding")
    if columns.get("id") != pa.int64() or found is None or not pa.types.is_fixed_size_list(found):
        raise RunError(f"{uri} is no part of an embedding table: its columns are {columns}")
    dtype = {pa.float16(): "float16", pa.float32(): "float32"}.get(found.value_type)
    if dtype is None:
        raise RunError(
            f"{uri} holds vectors of {found.value_type}; float16 or float32 is wanted, embed it"
            " again"
        )
    return found.list_size, dtype


def sample_queries(
    embeddings: str, ids: Ints, count: int, rng: np.random.Generator
) -> tuple[Ints, Floats32]:
    """Draw `count` of the queries ids[M] (ascending) uniformly -> ids[n], vectors[n, D].

    n is lower where the table holds fewer of them. Reads the ids of all parts, and the row groups
    of the chosen rows.
    """
    parts = open_embeddings(embeddings, "queries").parts
    lots = np.zeros(0)
    chosen = np.zeros((0, 3), dtype=np.int64)  # part, row group, row of the group
    for number, head in enumerate(read_heads((embeddings, part) for part in parts)):
        rows = np.flatnonzero(is_among(head.ids, ids))
        groups = np.repeat(np.arange(len(head.group_rows)), head.group_rows)[rows]
        starts = np.cumsum([0, *head.group_rows])[groups]
        columns = [np.full(len(rows), number), groups, rows - starts]
        drawn = np.concatenate([lots, rng.random(len(rows))])
        found = np.concatenate([chosen, np.stack(columns, axis=1)])
        lowest = np.argsort(drawn, kind="stable")[:count]  # the same chance for each row
        lots = drawn[lowest]
        chosen = found[lowest]
    chosen = chosen[np.lexsort(chosen.T[::-1])]

    def read(number: int) -> list[EmbeddingTable]:
        rows = chosen[chosen[:, 0] == number]
        groups = np.unique(rows[:, 1])
        tables = read_groups(embeddings, parts[number], groups.tolist())
        return [
            table.at(rows[rows[:, 1] == group, 2])
            for group, table in zip(groups, tables, strict=True)
        ]

    with ThreadPoolExecutor(READERS) as pool:
        tables = list(chain(*pool.map(read, np.unique(chosen[:, 0]).tolist())))
    if not tables:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    return (
        np.concatenate([table.ids for table in tables]),
        np.concatenate([table.vectors for table in tables]),
    )
