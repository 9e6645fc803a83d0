"""Search exactly within geographic cells, in the mining tasks themselves: mining.scope=cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.places import Places
from s4g_ray.index.exact_search import Engine, choose_engine, search, unit_rows
from s4g_ray.mining.candidates import SearchReferences
from s4g_ray.mining.cells.cell_tasks import CellSearch


@dataclass(frozen=True)
class ExactReferences:
    """Exact search by cosine among a few references."""

    engine: Engine
    num_threads: int

    def open(self, vectors: Floats32, ids: Ints) -> SearchReferences:
        """vectors[R, D], ids[R] -> a search of queries[M, D] for ids[M, k], scores[M, k]."""
        references = unit_rows(vectors)

        def answer(queries: Floats32, k: int) -> tuple[Ints, Floats32]:
            rows, scores = search(
                unit_rows(queries),
                references,
                ids,
                k,
                engine=self.engine,
                num_threads=self.num_threads,
            )
            return ids[rows], scores

        return answer


def make_cell_search(
    cfg: MiningConfig, places: Places, dim: int, seed: tuple[int, ...], engine: Engine | None = None
) -> CellSearch:
    """Return the search of a mining job within cells of places.

    engine: one that was chosen before, for the same last bits. None takes mining.exact_engine, or
    measures here which is fastest for vectors of D = dim.
    """
    engine = engine or cfg.exact_engine
    if engine == "auto":
        engine = choose_engine(dim, cfg.index_threads)
    return CellSearch(ExactReferences(engine, cfg.index_threads), places, seed)


def describe_cells(search: CellSearch, num_references: int) -> dict[str, Any]:
    """Return what a round records of a search within cells, as of an index."""
    engine = search.exact.engine if isinstance(search.exact, ExactReferences) else None
    return {"index": "cells", "references": num_references, "engine": engine}
