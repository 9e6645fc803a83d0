"""Batch plans: which training pairs meet in which global batch.

Sample4Geo's rule (arXiv 2303.11851, section 3.3): a batch starts from a random unused pair and its neighbors
join: half of `num_hard_negatives` are the nearest of the pool, half are drawn at random from the rest of it.
A plan depends on the pairs, the graph, the seed and the epoch, and not on the number of workers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray import storage
from s4g_ray.assembly import PLACE, POSITION, Turns, assemble, count_hard
from s4g_ray.bars import Bars
from s4g_ray.neighbors import NeighborGraph
from s4g_ray.parquet import plain
from s4g_ray.place_rows import PlaceLookup, PlaceRows
from s4g_ray.places import Exclusions

Ints = NDArray[np.int64]
Protocol = Literal["strict", "paper"]
PLAN_STREAM = 0x706C616E  # keeps the planner's random stream apart from others of the same (seed, epoch)
ROWS_PER_GROUP = 1_000_000  # of a saved plan: bounds the memory of writing it
_SCHEMA = pa.schema(
    [("batch", pa.int32()), ("slot", pa.int32()), ("query_id", pa.int64()), ("reference_id", pa.int64())]
)


@dataclass(frozen=True)
class PairTable:
    """Training pairs, one a row: query_ids[N], reference_ids[N], place_ids[N], int64."""

    query_ids: Ints
    reference_ids: Ints
    place_ids: Ints

    def __post_init__(self) -> None:
        if not len(self.query_ids) == len(self.reference_ids) == len(self.place_ids):
            raise ValueError("query_ids, reference_ids and place_ids differ in length")

    def __len__(self) -> int:
        return len(self.query_ids)


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
        stats = {**asdict(self.stats), **metadata, "num_batches": num_batches, "batch_size": batch_size}
        stats["gallery_size"] = gallery_size
        schema = _SCHEMA.with_metadata({f"s4g.{key}": str(value) for key, value in stats.items()})
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, schema, use_dictionary=["batch", "slot"]) as writer:
            for columns in self._columns(pairs):
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        storage.write_bytes(uri, buffer.getvalue())

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
            yield [pa.array(at.astype(np.int32)), pa.array((batch_size + column).astype(np.int32)), *ids]


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
    gallery[rows["batch"].to_numpy(), rows["slot"].to_numpy() - batch_size] = rows["reference_id"].to_numpy()
    return gallery


def load_record(uri: str) -> dict[str, Any]:
    """What the run's planner said of a saved plan (graph, hardness, what was left out); nothing without one."""
    filesystem, path = storage.filesystem_of(uri)
    with filesystem.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        return json.loads(file.metadata.metadata.get(b"s4g.record", b"{}"))  # type: ignore[no-any-return]


def _read_plan(uri: str, columns: list[str], *, gallery: bool) -> tuple[pa.Table, int, int, int]:
    """The pairs of a saved plan or its gallery rows, without reading the others; num_batches, batch_size, gallery_size.

    A row group holds one or the other.
    """
    filesystem, path = storage.filesystem_of(uri)
    with filesystem.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        known = file.metadata.metadata
        num_batches, batch_size, gallery_size = (
            int(known[f"s4g.{name}".encode()]) for name in ("num_batches", "batch_size", "gallery_size")
        )
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        first = int(np.searchsorted(np.cumsum(counts), num_batches * batch_size, side="right"))
        groups = range(first, len(counts)) if gallery else range(first)
        rows = plain(file.read_row_groups(list(groups), columns=columns), uri)
        return rows, num_batches, batch_size, gallery_size


def plan_batches(
    pairs: PairTable,
    graph: NeighborGraph | PlaceRows | None,
    *,
    batch_size: int,
    num_hard_negatives: int = 64,
    neighbor_pool_size: int = 128,
    seed: int,
    epoch: int,
    protocol: Protocol = "strict",
    exclusions: NeighborGraph | Exclusions | None = None,
) -> BatchPlan:
    """Arrange pairs into full batches of `batch_size`; without a graph, at random.

    Each pair stands in at most one batch, no place twice in a batch, and no two places that `exclusions`
    holds in either direction. What does not fill a batch is left out and counted. `strict` shuffles the
    order of the batches (as built they go from hard to easy); `paper` keeps it. Raises ValueError for
    impossible sizes, and for a pair whose place is not among those of PlaceRows. Source: arXiv 2303.11851,
    section 3.3.
    """
    check_sizes(batch_size, num_hard_negatives, neighbor_pool_size)
    rng = np.random.default_rng((seed, epoch, PLAN_STREAM))
    places = graph.places if isinstance(graph, PlaceRows) else np.unique(pairs.place_ids)
    rows = graph_rows(graph, places, neighbor_pool_size)
    lookup = PlaceLookup.of(places)
    turns, bars = Turns.draw(place_rows(pairs, lookup), len(places), rng), Bars.of(exclusions, lookup)
    built = assemble(
        turns, rows, bars,
        batch_size=batch_size, num_hard=num_hard_negatives, pool_size=neighbor_pool_size, rng=rng,
    )  # fmt: skip
    hardness = count_hard(built[..., PLACE], rows, num_hard_negatives) / max(built.size // 2, 1)
    positions = built[..., POSITION]
    if protocol == "strict":
        positions = positions[rng.permutation(len(positions))]
    stats = PlanStats(len(pairs), positions.size, len(pairs) - positions.size, hardness)
    return BatchPlan(turns.pairs[positions].astype(np.int64), stats)


def check_sizes(batch_size: int, num_hard_negatives: int, neighbor_pool_size: int) -> None:
    """Raises ValueError for sizes that no plan can have."""
    if batch_size < 2:
        raise ValueError(f"batch_size={batch_size} is below 2: a batch needs a negative")
    if not 0 <= num_hard_negatives <= neighbor_pool_size:
        raise ValueError(f"{num_hard_negatives=} exceeds {neighbor_pool_size=}; lower the first or raise the second")


def graph_rows(graph: NeighborGraph | PlaceRows | None, places: Ints, width: int) -> NDArray[np.int32]:
    """rows[P, K] of a graph's places, K = 0 without one."""
    if graph is None:
        return np.zeros((len(places), 0), dtype=np.int32)
    return graph.rows if isinstance(graph, PlaceRows) else PlaceRows.of(graph, places, width).rows


def place_rows(pairs: PairTable, lookup: PlaceLookup) -> NDArray[np.int32]:
    """The row of each pair's place. Raises ValueError when one has none."""
    rows = lookup.rows(pairs.place_ids)
    if (rows < 0).any():
        lost = pairs.place_ids[rows < 0]
        raise ValueError(f"{len(lost)} pairs are of places without a row in the graph, the first of {lost[0]}")
    return rows
