"""Define BatchPlan, which pairs share which batch, and read it from and write it to Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s4g_ray.arrays import Ints
from s4g_ray.data.pairs import PairTable
from s4g_ray.errors import RunError
from s4g_ray.storage import files
from s4g_ray.storage.parquet import refuse_extension_types

ROWS_PER_GROUP = 1_000_000  # of a saved plan: bounds the memory of writing it
READ_AT_ONCE = 65_536  # rows: bounds the memory of reading a share of a plan
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
    return load_plan_share(uri, 1, 0)


def load_plan_share(uri: str, num_ranks: int, rank: int) -> tuple[Ints, Ints]:
    """Read a rank's slots of a saved plan: query_ids[B, b] and reference_ids[B, b].

    b = ceil(batch_size / num_ranks): rank r takes slots r*b .. (r+1)*b - 1 of each batch; -1 pads
    the shares at the end. Holds this share and READ_AT_ONCE rows. Raises RunError where the file
    does not hold the number of pairs that it names.
    """
    with _open_plan(uri) as plan:
        num_slots = -(-plan.batch_size // num_ranks)
        query_ids = np.full((plan.num_batches, num_slots), -1, dtype=np.int64)
        reference_ids = query_ids.copy()
        start = 0
        for rows in plan.read(["query_id", "reference_id"], gallery=False):
            batches, slots = np.divmod(np.arange(start, start + len(rows)), plan.batch_size)
            is_own = slots // num_slots == rank
            at = (batches[is_own], slots[is_own] % num_slots)
            query_ids[at] = rows["query_id"].to_numpy()[is_own]
            reference_ids[at] = rows["reference_id"].to_numpy()[is_own]
            start += len(rows)
    if start != plan.num_batches * plan.batch_size:
        raise RunError(
            f"{uri} holds {start} pairs, not {plan.num_batches} batches of {plan.batch_size}; it"
            " was altered: remove it and resume the run"
        )
    return query_ids, reference_ids


def load_gallery(uri: str) -> Ints:
    """Read gallery[B, n] of a saved plan; n may be 0.

    Holds reference ids that join each batch without a query, -1 for none.
    """
    return load_gallery_share(uri, 1, 0)


def load_gallery_share(uri: str, num_ranks: int, rank: int) -> Ints:
    """Read a rank's columns of the gallery of a saved plan: [B, ceil(n / num_ranks)].

    They are dealt as load_plan_share deals slots.
    """
    with _open_plan(uri) as plan:
        num_columns = -(-plan.gallery_size // num_ranks)
        gallery = np.full((plan.num_batches, num_columns), -1, dtype=np.int64)
        for rows in plan.read(["batch", "slot", "reference_id"], gallery=True):
            columns = rows["slot"].to_numpy() - plan.batch_size
            is_own = columns // num_columns == rank
            at = (rows["batch"].to_numpy()[is_own], columns[is_own] % num_columns)
            gallery[at] = rows["reference_id"].to_numpy()[is_own]
    return gallery


@dataclass(frozen=True)
class PlanSize:
    """The size of a saved plan; num_pairs includes those that it leaves out."""

    num_pairs: int
    num_batches: int
    batch_size: int


def load_size(uri: str) -> PlanSize:
    """Read the size of a saved plan."""
    filesystem, path = files.filesystem_of(uri)
    with filesystem.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        metadata = file.metadata.metadata
    names = ("num_pairs", "num_batches", "batch_size")
    return PlanSize(*(int(metadata[f"s4g.{name}".encode()]) for name in names))


def load_record(uri: str) -> dict[str, Any]:
    """Read the record that the run's planner saved with a plan (graph, hardness, pairs left out).

    Returns an empty dictionary for a plan without a record.
    """
    filesystem, path = files.filesystem_of(uri)
    with filesystem.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        record: dict[str, Any] = json.loads(file.metadata.metadata.get(b"s4g.record", b"{}"))
        return record


@dataclass(frozen=True)
class _PlanFile:
    """An open file of a saved plan. A row group holds rows of pairs, or of the gallery."""

    uri: str
    parquet: pq.ParquetFile
    num_batches: int
    batch_size: int
    gallery_size: int

    def read(self, columns: list[str], *, gallery: bool) -> Iterator[pa.Table]:
        """Read the rows of the gallery, or those of the pairs, READ_AT_ONCE at a time.

        Reads nothing of the others.
        """
        metadata = self.parquet.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        num_pairs = self.num_batches * self.batch_size
        first = int(np.searchsorted(np.cumsum(counts), num_pairs, side="right"))
        groups = range(first, len(counts)) if gallery else range(first)
        # threads would keep 10 MB of the memory that they read with
        for rows in self.parquet.iter_batches(
            READ_AT_ONCE, list(groups), columns, use_threads=False
        ):
            yield refuse_extension_types(pa.Table.from_batches([rows]), self.uri)


@contextmanager
def _open_plan(uri: str) -> Iterator[_PlanFile]:
    filesystem, path = files.filesystem_of(uri)
    with filesystem.open(path, "rb") as stream, pq.ParquetFile(stream) as parquet:
        metadata = parquet.metadata.metadata
        num_batches, batch_size, gallery_size = (
            int(metadata[f"s4g.{name}".encode()])
            for name in ("num_batches", "batch_size", "gallery_size")
        )
        yield _PlanFile(uri, parquet, num_batches, batch_size, gallery_size)
    pa.default_memory_pool().release_unused()
