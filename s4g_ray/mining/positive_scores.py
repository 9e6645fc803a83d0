"""Score queries against their own place, where a place has several: task of a mining job. No Ray.

The scores say which queries of a place are hard; the sampler may prefer those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.pairs import pairs_by_place
from s4g_ray.data.tables.embedding_table import (
    EmbeddingTable,
    open_embeddings,
    read_embedding_part,
    read_heads,
)
from s4g_ray.data.tables.query_scores import (
    QueryScores,
    read_query_scores,
    write_query_scores,
)
from s4g_ray.mining.job_plan import MinedPart, OnBlock, Row, parts_of
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage.manifest import Part


@dataclass(frozen=True)
class Scoring:
    """The values that all tasks are handed. Parts of references are in the order of places."""

    embeddings: str
    target: str
    query_ids: Ints
    reference_ids: Ints
    parts: tuple[Part, ...]  # of the references' embeddings
    first_places: Ints  # of each part
    last_places: Ints

    @classmethod
    def from_embeddings(
        cls, embeddings: str, target: str, query_ids: Ints, reference_ids: Ints
    ) -> Scoring:
        """Read which part holds which places, of a published embedding table."""
        parts = open_embeddings(embeddings, "references").parts
        firsts = []
        lasts = []
        for head in read_heads((embeddings, part) for part in parts):
            firsts.append(head.place_ids.min())
            lasts.append(head.place_ids.max())
        return cls(
            embeddings, target, query_ids, reference_ids, parts, np.array(firsts), np.array(lasts)
        )

    def read_references(self, places: Ints) -> EmbeddingTable | None:
        """Read the references of places[P], ascending; None where there are none."""
        holds_any = np.searchsorted(places, self.first_places) < np.searchsorted(
            places, self.last_places, side="right"
        )
        tables = []
        for number in np.flatnonzero(holds_any):
            table = read_embedding_part(self.embeddings, self.parts[number])
            is_wanted = rows_of(places, table.place_ids) >= 0
            is_wanted &= rows_of(self.reference_ids, table.ids) >= 0
            tables.append(table.at(np.flatnonzero(is_wanted)))
        return EmbeddingTable.concatenate(tables) if tables else None


def score_group(shared: Scoring, row: Row, on_block: OnBlock) -> MinedPart:
    """Task: score the queries of consecutive parts whose place has several of them."""
    found = []
    for part in parts_of(row):
        table = read_embedding_part(shared.embeddings, part)
        table = table.at(np.flatnonzero(rows_of(shared.query_ids, table.ids) >= 0))
        places, counts = np.unique(table.place_ids, return_counts=True)
        several = places[counts > 1]
        references = shared.read_references(several)
        if references is not None:
            queries = table.at(np.flatnonzero(rows_of(several, table.place_ids) >= 0))
            found.append(score_own_places(queries, references))
        on_block(0)
    scores = QueryScores.join(found)
    if not len(scores):
        return MinedPart()
    return MinedPart(part=write_query_scores(shared.target, row["number"], scores))


def score_own_places(queries: EmbeddingTable, references: EmbeddingTable) -> QueryScores:
    """Return the cosine of each query to the best reference of its place.

    Queries of a place without a reference have none.
    """
    pairs = pairs_by_place(np.arange(len(queries)), queries.place_ids, references.place_ids)
    first = _normalize(queries.vectors)[pairs.rows]
    second = _normalize(references.vectors)[pairs.columns]
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    np.maximum.at(best, pairs.rows, np.einsum("nd,nd->n", first, second))
    scored = np.flatnonzero(best > -np.inf)
    return QueryScores.join([QueryScores(queries.ids[scored], best[scored])])


def carry_scores(graph: str, query_ids: Ints, target: str, number: int) -> Part | None:
    """Write the scores of an earlier graph, but for the queries query_ids[Q], ascending."""
    earlier = read_query_scores(graph)
    kept = earlier.take(rows_of(query_ids, earlier.query_ids) < 0)
    return write_query_scores(target, number, kept) if len(kept) else None


def written_parts(outcomes: Sequence[MinedPart]) -> list[Part]:
    """Return the files that tasks wrote."""
    return [outcome.part for outcome in outcomes if outcome.part is not None]


def _normalize(vectors: Floats32) -> Floats32:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny))
