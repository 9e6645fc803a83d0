"""BatchPlan: which pairs meet in which batch; its Parquet."""

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
    """What became of the pairs. num_planned + num_left_out == num_pairs."""

    num_pairs: int
    num_planned: int
    num_left_out: int  # did not fit a full batch; the next epoch starts from another order
    hardness: float  # mean over planned pairs: how many of its num_hard_negatives nearest places share its batch
    num_cells: int = 1  # geographic cells that were planned on their own


@dataclass(frozen=True)
class BatchPlan:
    """batches[B, batch_size]: rows of the pair table. Rank r of W takes slots r*b .. (r+1)*b - 1.

    gallery[B, n]: reference ids that join each batch without a query, -1 for none; None is n = 0.
    """

    batches: Ints
    stats: PlanStats
    gallery: Ints | None = None

    def save(self, uri: str, pairs: PairTable, **metadata: Any) -> None:
        """Write as Parquet (batch, slot, query_id, reference_id); stats go into the file's metadata.

        Gallery rows follow the pairs: slot is batch_size + column, query_id null.
        """
        num_batches, batch_size = self.batches.shape
        gallery_size = 0 if self.gallery is None else self.gallery.shape[1]
        stats = {
            **asdict(self.stats),
            **metadata,
            "num_batches": num_batches,
            "batch_size": batch_size,
        }
        stats["gallery_size"] = gallery_size
        schema = _SCHEMA.with_metadata({f"s4g.{key}": str(value) for key, value in stats.items()})
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, schema, use_dictionary=["batch", "slot"]) as writer:
            for columns in self._columns(pairs):
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        files.write_bytes(uri, buffer.getvalue())

    def _columns(self, pairs: PairTable) -> Iterator[list[pa.Array]]:
        """The file's columns: first all pairs, by batch and slot, then the gallery, ROWS_PER_GROUP rows at a time."""
        batch_size = self.batches.shape[1]
        step = max(1, ROWS_PER_GROUP // batch_size)
        for start in range(0, len(self.batches), step):
            rows = self.batches[start : start + step]
            batch, slot = np.indices(rows.shape, dtype=np.int32).reshape(2, -1)
            ids = pairs.query_ids[rows.ravel()], pairs.reference_ids[rows.ravel()]
            yield [pa.array(batch + np.int32(start)), pa.array(slot), *map(pa.array, ids)]
        if self.gallery is not None and self.gallery.size:
            at, column = np.nonzero(self.gallery >= 0)
            ids = pa.nulls(len(at), pa.int64()), pa.array(self.gallery[at, column])
            yield [
                pa.array(at.astype(np.int32)),
                pa.array((batch_size + column).astype(np.int32)),
                *ids,
            ]


def load_plan(uri: str) -> tuple[Ints, Ints]:
    """query_ids[B, batch_size] and reference_ids[B, batch_size] of a saved plan."""
    pairs, num_batches, batch_size, _ = _read_plan(uri, ["query_id", "reference_id"], gallery=False)
    queries, references = (pairs[name].to_numpy() for name in ("query_id", "reference_id"))
    return queries.reshape(num_batches, batch_size), references.reshape(num_batches, batch_size)


def load_gallery(uri: str) -> Ints:
    """gallery[B, n] of a saved plan: reference ids that join each batch without a query, -1 for none; n may be 0."""
    columns = ["batch", "slot", "reference_id"]
    rows, num_batches, batch_size, gallery_size = _read_plan(uri, columns, gallery=True)
    gallery = np.full((num_batches, gallery_size), -1, dtype=np.int64)
    gallery[rows["batch"].to_numpy(), rows["slot"].to_numpy() - batch_size] = rows[
        "reference_id"
    ].to_numpy()
    return gallery


def load_record(uri: str) -> dict[str, Any]:
    """What the run's planner said of a saved plan (graph, hardness, what was left out); nothing without one."""
    filesystem, path = files.filesystem_of(uri)
    with filesystem.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        return json.loads(file.metadata.metadata.get(b"s4g.record", b"{}"))  # type: ignore[no-any-return]


def _read_plan(uri: str, columns: list[str], *, gallery: bool) -> tuple[pa.Table, int, int, int]:
    """The pairs of a saved plan or its gallery rows, without reading the others; num_batches, batch_size, gallery_size.

    A row group holds one or the other.
    """
    filesystem, path = files.filesystem_of(uri)
    with filesystem.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        known = file.metadata.metadata
        num_batches, batch_size, gallery_size = (
            int(known[f"s4g.{name}".encode()])
            for name in ("num_batches", "batch_size", "gallery_size")
        )
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        first = int(np.searchsorted(np.cumsum(counts), num_batches * batch_size, side="right"))
        groups = range(first, len(counts)) if gallery else range(first)
        rows = refuse_extension_types(file.read_row_groups(list(groups), columns=columns), uri)
        return rows, num_batches, batch_size, gallery_size
