"""Embedding tables, read: whole, part by part, or the ids of a part alone. Neither Ray nor torch is imported."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.errors import RunError, StoreError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import (
    Manifest,
    Part,
    Stamp,
    altered,
    open_part,
    open_published,
    read_part,
)
from s4g_ray.storage.parquet import refuse_extension_types

if TYPE_CHECKING:
    from s4g_ray.data.image_table import ImageTable, View

READERS = 16  # threads that read heads of parts: each waits for the file system most of the time


@dataclass(frozen=True)
class EmbeddingTable:
    """ids[N], place_ids[N], vectors[N, D] float32, in the order of the parts."""

    ids: Ints
    place_ids: Ints
    vectors: Floats32

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, ids: Ints) -> EmbeddingTable:
        """The rows whose id is among `ids`."""
        rows = np.isin(self.ids, ids)
        return EmbeddingTable(self.ids[rows], self.place_ids[rows], self.vectors[rows])


def read_embeddings(folder: str, view: View, *, stamp: Stamp | None = None) -> EmbeddingTable:
    """Read one view of a published table. Raises RunError when unpublished, altered, or not made from `stamp`."""
    tables = list(read_embedding_parts(folder, view, stamp=stamp))
    return EmbeddingTable(
        np.concatenate([table.ids for table in tables]),
        np.concatenate([table.place_ids for table in tables]),
        np.concatenate([table.vectors for table in tables]),
    )


def read_embedding_parts(
    folder: str, view: View, *, stamp: Stamp | None = None
) -> Iterator[EmbeddingTable]:
    """The parts of one view of a published table, one after the other. Raises RunError as read_embeddings does."""
    dim = None
    for part in open_embeddings(folder, view, stamp=stamp).parts:
        table = read_embedding_part(folder, part)
        if dim not in (None, table.vectors.shape[1]):
            raise RunError(
                f"{folder}/{part.name} holds D={table.vectors.shape[1]}, the parts before it {dim}"
            )
        dim = table.vectors.shape[1]
        yield table


def open_embeddings(folder: str, view: View, *, stamp: Stamp | None = None) -> Manifest:
    """The manifest of a published table with the parts of one view. Raises RunError as read_embeddings does."""
    manifest = open_published(folder, "embeddings", stamp)
    parts = tuple(part for part in manifest.parts if part.name.startswith(f"{view}/"))
    if not parts:
        raise RunError(f"{folder} holds no {view}")
    return replace(manifest, parts=parts)


def read_embedding_part(folder: str, part: Part) -> EmbeddingTable:
    """Read a part of a published table. Raises RunError when it is missing, altered or of another schema."""
    uri = files.join(folder, part.name)
    table = refuse_extension_types(
        pq.read_table(io.BytesIO(read_part(folder, part))), uri
    ).combine_chunks()
    dim, _ = _vector_type(table.schema, uri)
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(table), dim).astype(np.float32, copy=False)
    return EmbeddingTable(table["id"].to_numpy(), table["place_id"].to_numpy(), vectors)


class PartHead(NamedTuple):
    """What a part says without its vectors being read: ids[n], place_ids[n], the vectors' D and dtype."""

    ids: Ints
    place_ids: Ints
    dim: int
    dtype: str


def read_part_head(folder: str, part: Part) -> PartHead:
    """Read ids and places of a part alone. Raises RunError as read_embedding_part, but for bytes altered in place."""
    with open_part(folder, part) as file:
        try:
            parquet = pq.ParquetFile(file)
            table = refuse_extension_types(
                parquet.read(columns=["id", "place_id"]), files.join(folder, part.name)
            )
            ids, place_ids = (table[name].to_numpy() for name in ("id", "place_id"))
        except StoreError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise altered(folder, part) from error
        return PartHead(
            ids, place_ids, *_vector_type(parquet.schema_arrow, files.join(folder, part.name))
        )


def read_heads(files: Iterable[tuple[str, Part]]) -> Iterator[PartHead]:
    """The heads of parts, each given with its folder, in order; READERS are read at once. Raises as read_part_head."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(lambda file: read_part_head(*file), files)


def _vector_type(schema: pa.Schema, uri: str) -> tuple[int, str]:
    """D and dtype of a part's vectors. Raises RunError for other columns than an embedding table has."""
    columns = {field.name: field.type for field in schema}
    found = columns.get("embedding")
    if columns.get("id") != pa.int64() or found is None or not pa.types.is_fixed_size_list(found):
        raise RunError(f"{uri} is no part of an embedding table: its columns are {columns}")
    dtype = {pa.float16(): "float16", pa.float32(): "float32"}.get(found.value_type)
    if dtype is None:
        raise RunError(
            f"{uri} holds vectors of {found.value_type}; float16 or float32 is wanted, embed it anew"
        )
    return found.list_size, dtype


def read_rows(
    folder: str, view: View, table: ImageTable, *, stamp: Stamp | None = None
) -> tuple[EmbeddingTable, ImageTable]:
    """As read_embeddings, of the rows of a table only, with those rows in the same order; skipped images lack both."""
    embedded = read_embeddings(folder, view, stamp=stamp).take(table.ids)
    return embedded, table.take(table.rows(embedded.ids))


def encode_part(ids: Ints, places: Ints, vectors: Floats32, dtype: str) -> bytes:
    """A part of an embedding table as Parquet; vectors[n, D]."""
    values = pa.array(vectors.astype(dtype).ravel())
    table = pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "place_id": pa.array(places, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1]),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


SAMPLED_PARTS = 16  # at least, that the sample for recall is drawn from, where there are so many


def sample_queries(embeddings: str, ids: Ints, count: int, rng: np.random.Generator) -> Floats32:
    """Vectors of about `count` of some queries, from a few parts that are drawn at random: [n, D]."""
    parts = open_embeddings(embeddings, "queries").parts
    share = max(1, -(-count // min(len(parts), SAMPLED_PARTS)))
    found: list[Floats32] = []
    for number in rng.permutation(len(parts)):
        table = read_embedding_part(embeddings, parts[number])
        rows = np.flatnonzero(np.isin(table.ids, ids))
        found.append(table.vectors[np.sort(rng.permutation(rows)[:share])])
        if sum(map(len, found)) >= count:
            break
    return np.concatenate(found)[:count]
