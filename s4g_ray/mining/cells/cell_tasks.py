"""Define the tasks that mine within cells: deal the table's rows to blocks, mine a block. No Ray.

A table is in the order of places, cells are geographic: so each part is read once, and its rows are
written again by block, side by side, for the block's task to read in one piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.image_table import View
from s4g_ray.data.places import Places
from s4g_ray.data.tables.embedding_table import EmbeddingTable, read_embedding_part
from s4g_ray.data.tables.neighbor_graph import NeighborGraph, join_graphs
from s4g_ray.errors import RunError
from s4g_ray.mining.candidates import Kept, SearchReferences
from s4g_ray.mining.cells.cell_plan import CellPlan
from s4g_ray.mining.group_tasks import MiningJob, check_finite
from s4g_ray.mining.groups import plan_groups
from s4g_ray.mining.job_plan import MinedPart, OnBlock, Row, describe_group, parts_of
from s4g_ray.mining.report import Counts
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import read_ranges
from s4g_ray.storage.manifest import Part, write_part
from s4g_ray.storage.part_commits import WORK

DEALT_BYTES = 128_000_000  # of parts that one task deals, at least

Records = NDArray[Any]  # of the type that record_type returns


class ExactSearch(Protocol):
    """Exact search among a few vectors; it is pickled into Ray tasks."""

    def open(self, vectors: Floats32, ids: Ints) -> SearchReferences:
        """vectors[R, D], ids[R] -> a search of queries[M, D] for ids[M, k], scores[M, k]."""
        ...


@dataclass(frozen=True)
class CellSearch:
    """How a job searches within cells, in place of an index.

    places: all places of queries and references. seed: of this round's far references.
    """

    exact: ExactSearch
    places: Places
    seed: tuple[int, ...]


@dataclass(frozen=True)
class CellMining:
    """A job whose queries search within cells. dim, dtype: of the table's vectors."""

    job: MiningJob
    exact: ExactSearch
    plan: CellPlan
    dim: int
    dtype: str

    @property
    def record_type(self) -> np.dtype[Any]:
        """The layout of a dealt row: id, place and vector, without gaps."""
        return np.dtype(
            [("id", "<i8"), ("place", "<i8"), ("vector", np.dtype(self.dtype), (self.dim,))]
        )


def plan_dealing(parts: Sequence[Part]) -> list[Row]:
    """Return the arguments of the tasks that deal the parts of a table: some parts of one view."""
    rows: list[Row] = []
    views: tuple[View, ...] = ("queries", "references")
    for view in views:
        of_view = [part for part in parts if part.name.startswith(f"{view}/")]
        for group in plan_groups([part.num_bytes for part in of_view], DEALT_BYTES):
            rows.append({**describe_group(len(rows), of_view, group), "view": view})
    return rows


def deal_rows(shared: CellMining, row: Row, on_block: OnBlock) -> MinedPart:
    """Task: write the rows of some parts of one view again, by the block that needs them."""
    pieces: list[list[bytes]] = [[] for _ in range(shared.plan.num_blocks)]
    for part in parts_of(row):
        table = read_embedding_part(shared.job.embeddings, part)
        at, blocks = _find_blocks(shared, row["view"], table)
        order = np.argsort(blocks, kind="stable")
        edges = np.searchsorted(blocks[order], np.arange(shared.plan.num_blocks + 1))
        for block in np.unique(blocks).tolist():
            rows = at[order[edges[block] : edges[block + 1]]]
            pieces[block].append(_pack(shared, table, rows))
        on_block(0)
    size = shared.record_type.itemsize
    starts = np.cumsum([0, *(sum(map(len, found)) // size for found in pieces)])
    data = b"".join(piece for found in pieces for piece in found)
    work = files.join(shared.job.target, WORK)
    aside = write_part(work, f"dealt-{row['number']:05d}.bin", data, int(starts[-1]))
    return MinedPart(aside=aside, starts=tuple(starts.tolist()))


def _find_blocks(shared: CellMining, view: View, table: EmbeddingTable) -> tuple[Ints, Ints]:
    """Return at[m] and blocks[m]: the rows of a part that blocks need."""
    job = shared.job
    known = job.query_ids if view == "queries" else job.references.ids
    rows = rows_of(known, table.ids)
    used = np.flatnonzero(rows >= 0)
    if view == "queries":
        return used, shared.plan.blocks_of_queries(table.place_ids[used])
    at, blocks = shared.plan.blocks_of_references(rows[used], table.place_ids[used])
    return used[at], blocks


def _pack(shared: CellMining, table: EmbeddingTable, rows: Ints) -> bytes:
    records = np.empty(len(rows), shared.record_type)
    records["id"] = table.ids[rows]
    records["place"] = table.place_ids[rows]
    records["vector"] = table.vectors[rows]
    return records.tobytes()


def plan_blocks(plan: CellPlan, dealing: Sequence[Row], dealt: Sequence[MinedPart]) -> list[Row]:
    """Return the arguments of each block's task: the pieces of dealt files that it reads.

    Blocks without queries are left out.
    """
    rows: list[Row] = []
    for block in range(plan.num_blocks):
        row: Row = {"number": len(rows), "block": block, "queries": [], "references": []}
        for task, outcome in zip(dealing, dealt, strict=True):
            start, end = outcome.starts[block : block + 2]
            if outcome.aside is not None and end > start:
                row[task["view"]].append((outcome.aside.name, start, end))
        if row["queries"]:
            rows.append(row)
    return rows


def mine_block(shared: CellMining, row: Row, on_block: OnBlock) -> MinedPart:
    """Task: mine the places of a block of cells, cell by cell."""
    plan = shared.plan
    queries = _read_records(shared, row["queries"])
    check_finite(shared.job.embeddings, queries["id"], queries["vector"])
    references = _read_records(shared, row["references"])
    query_cells = plan.cells_of(queries["place"])
    cells = plan.cells_of(references["place"])
    far_ids = shared.job.references.ids[plan.far_rows_of(row["block"])]
    is_far = rows_of(far_ids, references["id"]) >= 0
    counts = Counts()
    graphs: list[NeighborGraph] = []
    for cell in np.unique(query_cells):
        asking = queries[query_cells == cell]
        is_candidate = is_far | np.isin(cells, plan.cells.around(np.array([cell])))
        own = np.ascontiguousarray(asking["place"])
        kept = _search_cell(shared, asking, references[is_candidate], own, on_block)
        counts += Counts.from_queries(kept)
        graphs.append(shared.job.merge(own, kept))
    return shared.job.write_part(row["number"], join_graphs(graphs), counts)


def _search_cell(
    shared: CellMining, queries: Records, references: Records, own: Ints, on_block: OnBlock
) -> Kept:
    """Find the neighbors of a cell's queries among its candidates."""
    job = shared.job
    if not len(references):
        on_block(len(queries))
        return Kept.unfilled(len(queries), job.k)
    search = shared.exact.open(
        references["vector"].astype(np.float32), np.ascontiguousarray(references["id"])
    )
    widths = dataclasses.replace(
        job.widths,
        first=min(job.widths.first, len(references)),
        limit=min(job.widths.limit, len(references)),
    )
    return job.find(search, queries["vector"].astype(np.float32), own, on_block, widths)


def _read_records(shared: CellMining, pieces: Sequence[tuple[str, int, int]]) -> Records:
    """Read pieces of dealt files; the rows are in the order of their ids.

    Raises RunError for a file that is missing or cut short.
    """
    record_type = shared.record_type
    work = files.join(shared.job.target, WORK)
    ranges = [
        (files.join(work, name), start * record_type.itemsize, (end - start) * record_type.itemsize)
        for name, start, end in pieces
    ]
    contents = read_ranges(ranges)
    for data, (uri, _, _) in zip(contents, ranges, strict=True):
        if isinstance(data, RunError):
            raise data
        if isinstance(data, Exception):
            raise RunError(f"{uri} cannot be read ({data}); resume") from data
    pieces_read = [np.frombuffer(data, record_type) for data in contents if isinstance(data, bytes)]
    records = np.concatenate([np.empty(0, record_type), *pieces_read])
    del contents, pieces_read  # as large as the records
    return records[np.argsort(records["id"])]
