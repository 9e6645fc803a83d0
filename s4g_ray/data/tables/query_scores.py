"""Write and read query scores: how alike a query and its own place are to the mined encoder.

They lie beside a neighbor graph, in query_scores-*.parquet (query_id int64, score float32), and are
published with it. Only queries of places with several queries have one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_published, read_part, write_part
from s4g_ray.storage.parquet import refuse_extension_types

PREFIX = "query_scores-"  # of the names of files
_ENTRY = "query_scores"  # of the manifest's info


@dataclass(frozen=True)
class QueryScores:
    """query_ids[M], ascending, and scores[M]: the cosine to the best reference of the own place."""

    query_ids: Ints
    scores: Floats32

    def __len__(self) -> int:
        return len(self.query_ids)

    @classmethod
    def join(cls, tables: Sequence[QueryScores]) -> QueryScores:
        """Return the rows of tables, sorted by id."""
        ids = np.concatenate([np.zeros(0, np.int64), *(table.query_ids for table in tables)])
        scores = np.concatenate([np.zeros(0, np.float32), *(table.scores for table in tables)])
        order = np.argsort(ids, kind="stable")
        return cls(ids[order], scores[order])

    def take(self, chosen: Any) -> QueryScores:
        """Return the chosen rows: a mask or ascending row numbers."""
        return QueryScores(self.query_ids[chosen], self.scores[chosen])


def write_query_scores(folder: str, number: int, table: QueryScores) -> Part:
    """Write a file of a graph's folder, to be published with the graph."""
    buffer = io.BytesIO()
    columns = {"query_id": pa.array(table.query_ids), "score": pa.array(table.scores)}
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return write_part(folder, f"{PREFIX}{number:05d}.parquet", buffer.getvalue(), len(table))


def describe_query_scores(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the entry of a graph's manifest that names the files."""
    return {_ENTRY: [asdict(part) for part in parts]}


def read_query_scores(graph: str) -> QueryScores:
    """Read the scores that were published with a graph; of no query where it has none.

    Raises RunError when the graph is unpublished, or a file is missing or altered.
    """
    return QueryScores.join(list(_read_parts(graph)))


def _read_parts(graph: str) -> Iterator[QueryScores]:
    manifest = open_published(graph, "neighbors")
    for entry in manifest.info.get(_ENTRY, ()):
        part = Part(**entry)
        contents = pq.read_table(io.BytesIO(read_part(graph, part)))
        table = refuse_extension_types(contents, files.join(graph, part.name))
        yield QueryScores(table["query_id"].to_numpy(), table["score"].to_numpy())
