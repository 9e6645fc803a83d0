"""Hold vectors in a graph that leads a query to its neighbors (FAISS's HNSW index)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats32, Ints
from s4g_ray.index.faiss_library import faiss, set_faiss_threads
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.stores.gpu import add_blocks
from s4g_ray.index.stores.ivf_training import nearest_lists
from s4g_ray.index.stores.store import (
    Scope,
    cut_blocks,
    mark_missing,
    merge_blocks,
    pick_allowed,
    selector_of,
)
from s4g_ray.index.top_k import Found

EF_CONSTRUCTION = 80
# vectors that a query may be compared with for each candidate, instead of walking the graph
COMPARED = 64


class HnswStore:
    """Vectors of rows in a graph. A row cannot leave it: it is left out of answers, by a scope."""

    def __init__(self, index: Any, ef_search: int) -> None:
        self.effort: int | None = ef_search
        self._index = index

    @classmethod
    def empty(cls, plan: IndexPlan) -> Self:
        """Make a graph without vectors; it needs no training."""
        graph = faiss.IndexHNSWFlat(plan.dim, plan.links, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        return cls(graph, plan.ef_search)

    @classmethod
    def from_bytes(cls, data: Any, ef_search: int) -> Self:
        """Read a graph that `write` serialised."""
        return cls(faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8)), ef_search)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def max_effort(self) -> int:
        """A candidate list as long as the graph."""
        return max(len(self), 1)

    def add(self, vectors: Floats32) -> None:
        """Append vectors[n, D]; faiss (1.15.1) links them alike for any number of threads."""
        self._index.add(vectors)

    def keep(self, rows: Bools) -> bool:
        """Build the graph anew where half of its rows or more are dropped, else return False."""
        if 2 * int(rows.sum()) > len(rows):
            return False
        graph = faiss.IndexHNSWFlat(
            self._index.d, int(self._index.hnsw.nb_neighbors(1)), faiss.METRIC_INNER_PRODUCT
        )
        graph.hnsw.efConstruction = self._index.hnsw.efConstruction
        add_blocks(graph, self._vectors()[rows])
        self._index = graph
        return True

    def search(self, queries: Floats32, k: int, effort: int | None, scope: Scope) -> Found:
        """Search as Store.search does; effort: candidates of a query that the scope allows.

        Compares few rows one by one.
        """
        set_faiss_threads(scope.num_threads)
        effort = effort or 1
        selector = None
        if scope.rows is not None:
            effort = min(-(-effort * len(self) // max(len(scope.rows), 1)), self.max_effort)
            if len(scope.rows) <= COMPARED * effort:
                return self.search_all(queries, k, scope)
            selector = selector_of(faiss, scope.rows, len(self))
        parameters = faiss.SearchParametersHNSW(efSearch=effort)
        if selector is not None:
            parameters.sel = selector
        scores, rows = self._index.search(queries, k, params=parameters)
        return mark_missing(rows, scores)

    def search_all(self, queries: Floats32, k: int, scope: Scope) -> Found:
        """Compare queries with all vectors of the scope's rows, block by block."""
        set_faiss_threads(scope.num_threads)
        rows = pick_allowed(scope, len(self))
        return merge_blocks(len(queries), k, scope.ids, self._search_blocks(queries, k, rows))

    def write(self, file: BinaryIO) -> None:
        """Append the graph to a file, as faiss serialises it."""
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))

    def _vectors(self) -> NDArray[np.float32]:
        """Return the vectors[N, D], in the graph's memory."""
        storage = faiss.downcast_index(self._index.storage)
        values = faiss.rev_swig_ptr(storage.get_xb(), len(self) * self._index.d)
        return np.asarray(values).reshape(len(self), self._index.d)

    def _search_blocks(self, queries: Floats32, k: int, rows: Ints) -> Iterator[tuple[Ints, Found]]:
        for block in cut_blocks(rows):
            flat = faiss.IndexFlatIP(self._index.d)
            flat.add(self._vectors()[block])
            yield block, nearest_lists(flat, queries, min(k, len(block)))
