"""Define the tasks of a mining job that read groups of parts: mine them, or carry rows over.

No Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.tables.embedding_table import read_embedding_part
from s4g_ray.data.tables.neighbor_graph import NeighborGraph, join_graphs, write_graph_part
from s4g_ray.errors import RunError
from s4g_ray.mining.candidates import (
    Filters,
    Kept,
    References,
    SearchReferences,
    Widths,
    find_neighbors,
    merge_neighbors,
)
from s4g_ray.mining.carried_rows import read_carried
from s4g_ray.mining.job_plan import MinedPart, OnBlock, Row, parts_of
from s4g_ray.mining.overlap import SampledRows
from s4g_ray.mining.report import Counts
from s4g_ray.row_lookup import rows_of


class Searcher(Protocol):
    """An index that Ray tasks can ask: it is pickled into them."""

    def search(self, version: int, queries: Floats32, k: int) -> tuple[Ints, Floats32]:
        """queries[M, D] -> ids[M, k], scores[M, k], best first. Raises RunError."""
        ...


@dataclass(frozen=True)
class MiningJob:
    """The values that all tasks of a job are handed, once in Ray's object store."""

    version: int
    embeddings: str
    target: str
    cfg: MiningConfig
    k: int
    widths: Widths
    query_ids: Ints
    references: References
    exclusions: Exclusions | None
    previous: SampledRows | None

    def find(
        self,
        search: SearchReferences,
        vectors: Floats32,
        own: Ints,
        on_block: OnBlock,
        widths: Widths | None = None,
    ) -> Kept:
        """Find the neighbors of queries: vectors[M, D] of places own[M].

        widths: those of the job, or fewer where the search has fewer references.
        """
        return find_neighbors(
            search,
            vectors,
            own,
            self.references,
            Filters.from_config(self.cfg, self.k, self.exclusions),
            widths or self.widths,
            block=self.cfg.query_block,
            on_block=on_block,
        )

    def merge(self, own: Ints, kept: Kept) -> NeighborGraph:
        """Merge what queries kept: own[M] are their places, their ids ascend within a place."""
        last_only = self.cfg.merge_queries is False
        return merge_neighbors(own, kept.neighbors, kept.scores, self.k, last_only=last_only)

    def write_part(self, number: int, graph: NeighborGraph, counts: Counts) -> MinedPart:
        """Write a part of the graph, and add its counts to those of its queries."""
        num_compared = 0
        num_shared = 0
        if self.previous is not None:
            num_compared, num_shared = self.previous.compare(graph)
        counts += Counts.from_graph(graph, num_compared, num_shared)
        return MinedPart(counts, write_graph_part(self.target, number, graph))


@dataclass(frozen=True)
class GlobalMining:
    """A job whose queries search all references."""

    job: MiningJob
    search: Searcher


def check_finite(embeddings: str, ids: Ints, vectors: NDArray[Any]) -> None:
    """Raise RunError, with the id, for queries of a table whose vectors[M, D] are not finite."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise RunError(
            f"{embeddings}: the embedding of query {ids[bad[0]]} is not finite ({len(bad)} such);"
            " remove it and embed it anew, from a checkpoint that is finite"
        )


def mine_group(shared: GlobalMining, row: Row, on_block: OnBlock) -> MinedPart:
    """Task: mine the places of consecutive parts of the queries' embeddings."""
    job = shared.job
    counts = Counts()
    graphs: list[NeighborGraph] = []
    for part in parts_of(row):
        table = read_embedding_part(job.embeddings, part)
        is_mined = rows_of(job.query_ids, table.ids) >= 0
        own = table.place_ids[is_mined]
        vectors = table.vectors[is_mined]
        check_finite(job.embeddings, table.ids[is_mined], vectors)
        kept = job.find(
            lambda queries, width: shared.search.search(job.version, queries, width),
            vectors,
            own,
            on_block,
        )
        counts += Counts.from_queries(kept)
        graphs.append(job.merge(own, kept))
    return job.write_part(row["number"], join_graphs(graphs), counts)


@dataclass(frozen=True)
class Carrying:
    """A job that carries over rows of an earlier graph. mined[P]: places that it leaves out."""

    source: str
    target: str
    mined: Ints
    k: int  # neighbors of a place in the earlier graph, at most


def carry_group(shared: Carrying, row: Row, on_block: OnBlock) -> MinedPart:
    """Task: write the rows of consecutive parts of an earlier graph that were not mined."""
    graphs: list[NeighborGraph] = []
    for part in parts_of(row):
        graphs.append(read_carried(shared.source, part, shared.mined, shared.k))
        on_block(0)
    graph = join_graphs(graphs)
    counts = Counts(carried=len(graph.place_ids))
    return MinedPart(counts, write_graph_part(shared.target, row["number"], graph))
