"""Define BatchPlan, which pairs share which batch, and read it from and write it to Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s4g_ray.arrays import Ints
from s4g_ray.data.pairs import PairTable
from s4g_ray.storage import files
from s4g_ray.storage.parquet import refuse_extension_types

ROWS_PER_GROUP = 1_000_000  # of a saved plan: bounds the memory of writing it
_SCHEMA = pa.schema(
    [
        ("batch", pa.int32()),
        ("slot", pa.int32()),
        ("query_id", pa.int64()),
        ("reference_id", pa.int64()),
    ]
)


@dataclass(frozen=True)
class PlanStats:
    """Counts and hardness of a plan. num_planned + num_left_out == num_pairs."""

    num_pairs: int
    num_planned: int
    num_left_out: int  # did not fit a full batch; the next epoch starts from another order
    # Mean over planned pairs: how many of a pair's num_hard_negatives nearest places are in its
    # batch.
    hardness: float
    num_cells: int = 1  # geographic cells that were planned separately


@dataclass(frozen=True)
class BatchPlan:
    """batches[B, batch_size]: rows of the pair table. Rank r of W takes slots r*b .. (r+1)*b - 1.

    gallery[B, n]: reference ids that join each batch without a query, -1 for none; None is n = 0.
    """

    batches: Ints
    stats: PlanStats
    gallery: Ints | None = None

    def save(self, uri: str, pairs: PairTable, **metadata: Any) -> None:
        """Write as Parquet (batch, slot, query_id, reference_id), with the stats as metadata.

        Gallery rows follow the pairs: slot is batch_size + column, query_id null.
        """
        num_batches, batch_size = self.batches.shape
        values = {
            **asdict(self.stats),
            **metadata,
            "num_batches": num_batches,
            "batch_size": batch_size,
            "gallery_size": 0 if self.gallery is None else self.gallery.shape[1],
        }
        schema = _SCHEMA.with_metadata({f"s4g.{key}": str(value) for key, value in values.items()})
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, schema, use_dictionary=["batch", "slot"]) as writer:
            for columns in self._list_columns(pairs):
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        files.write_bytes(uri, buffer.getvalue())

    def _list_columns(self, pairs: PairTable) -> Iterator[list[pa.Array]]:
        """Yield the file's columns, ROWS_PER_GROUP rows at a time.

        First all pairs, by batch and slot, then the gallery.
        """
        batch_size = self.batches.shape[1]
        step = max(1, ROWS_PER_GROUP // batch_size)
        for start in range(0, len(self.batches), step):
            rows = self.batches[start : start + step]
            batches, slots = np.indices(rows.shape, dtype=np.int32).reshape(2, -1)
            yield [
                pa.array(batches + np.int32(start)),
                pa.array(slots),
                pa.array(pairs.query_ids[rows.ravel()]),
                pa.array(pairs.reference_ids[rows.ravel()]),
            ]
        if self.gallery is not None and self.gallery.size:
            numbers, columns = np.nonzero(self.gallery >= 0)
            yield [
                pa.array(numbers.astype(np.int32)),
                pa.array((batch_size + columns).astype(np.int32)),
                pa.nulls(len(numbers), pa.int64()),
                pa.array(self.gallery[numbers, columns]),
            ]


def load_plan(uri: str) -> tuple[Ints, Ints]:
    """Read query_ids[B, batch_size] and reference_ids[B, batch_size] of a saved plan."""
    names = ["query_id", "reference_id"]
    pairs, num_batches, batch_size, _ = _read_plan(uri, names, gallery=False)
    queries, references = (pairs[name].to_numpy() for name in names)
    return queries.reshape(num_batches, batch_size), references.reshape(num_batches, batch_size)


def load_gallery(uri: str) -> Ints:
    """Read gallery[B, n] of a saved plan; n may be 0.

    Holds reference ids that join each batch without a query, -1 for none.
    """
    names = ["batch", "slot", "reference_id"]
    rows, num_batches, batch_size, gallery_size = _read_plan(uri, names, gallery=True)
    batches, slots, references = (rows[name].to_numpy() for name in names)
    gallery = np.full((num_batches, gallery_size), -1, dtype=np.int64)
    gallery[batches, slots - batch_size] = references
    return gallery


def load_record(uri: str) -> dict[str, Any]:
    """Read the record that the run's planner saved with a plan (graph, hardness, pairs left out).

    Returns an empty dictionary for a plan without a record.
    """
    filesystem, path = files.filesystem_of(uri)
    with filesystem.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        record: dict[str, Any] = json.loads(file.metadata.metadata.get(b"s4g.record", b"{}"))
        return record


def _read_plan(uri: str, columns: list[str], *, gallery: bool) -> tuple[pa.Table, int, int, int]:
    """Read the pairs of a saved plan, or its gallery rows, without reading the others.

    A row group holds one or the other. Returns the rows, num_batches, batch_size and gallery_size.
    """
    filesystem, path = files.filesystem_of(uri)
    with filesystem.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        metadata = file.metadata.metadata
        num_batches, batch_size, gallery_size = (
            int(metadata[f"s4g.{name}".encode()])
            for name in ("num_batches", "batch_size", "gallery_size")
        )
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        first = int(np.searchsorted(np.cumsum(counts), num_batches * batch_size, side="right"))
        groups = range(first, len(counts)) if gallery else range(first)
        rows = refuse_extension_types(file.read_row_groups(list(groups), columns=columns), uri)
        return rows, num_batches, batch_size, gallery_size
