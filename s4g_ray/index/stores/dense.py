"""Hold all vectors, float32 or float16, row by row, and search them exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats32, Ints
from s4g_ray.index.exact_search import search
from s4g_ray.index.stores.gpu import GpuCopy, GpuDevice, GpuPart
from s4g_ray.index.stores.store import SUBSET_BLOCK, Scope, cut_blocks, merge_blocks
from s4g_ray.index.top_k import Found


class DenseStore:
    """Vectors[N, D] of length 1, as an array."""

    max_effort = 0

    def __init__(self, vectors: NDArray[Any]) -> None:
        self.effort: int | None = None
        self._vectors = vectors
        self._gpu: GpuCopy | None = None

    def __len__(self) -> int:
        return len(self._vectors)

    def add(self, vectors: Floats32) -> None:
        """Append vectors[n, D]."""
        self._vectors = append_rows(self._vectors, vectors)
        self._discard_copy()

    def keep(self, rows: Bools) -> bool:
        """Drop the rows that are False; the others move forward in the same memory."""
        self._vectors = keep_rows(self._vectors, rows)
        self._discard_copy()
        return True

    def search(self, queries: Floats32, k: int, effort: int | None, scope: Scope) -> Found:
        """Search as Store.search does; equal scores are ordered by lower id."""
        if effort is not None:
            raise ValueError(f"effort={effort}: an exact search takes none")
        if scope.rows is None and self._gpu is not None:
            rows, scores, doubtful = self._gpu.search(queries, k, None)
            if doubtful.any():
                rows[doubtful], scores[doubtful] = self.search_all(queries[doubtful], k, scope)
            return rows, scores
        return self.search_all(queries, k, scope)

    def search_all(self, queries: Floats32, k: int, scope: Scope) -> Found:
        """Search by the scope's engine; some rows are gathered block by block."""
        if scope.rows is None or len(scope.rows) == len(self):
            return self._search_rows(queries, slice(None), k, scope)
        blocks = self._search_blocks(queries, k, scope.rows, scope)
        return merge_blocks(len(queries), k, scope.ids, blocks)

    def write(self, file: BinaryIO) -> None:
        """Append the vectors to a file."""
        for start in range(0, len(self), SUBSET_BLOCK):
            file.write(np.ascontiguousarray(self._vectors[start : start + SUBSET_BLOCK]).data)

    def to_gpu(self, gpu: GpuDevice) -> None:
        """Copy the vectors to a GPU; float16 stays float16 there."""

        def make_parts(count: int) -> list[GpuPart]:
            return [
                GpuPart(gpu.make_flat(self._vectors[first::count]), count, first)
                for first in range(count)
            ]

        self._gpu = GpuCopy(gpu, make_parts)

    def _discard_copy(self) -> None:
        if self._gpu is not None:
            self._gpu.discard()

    def _search_blocks(
        self, queries: Floats32, k: int, rows: Ints, scope: Scope
    ) -> Iterator[tuple[Ints, Found]]:
        for block in cut_blocks(rows):
            yield block, self._search_rows(queries, block, min(k, len(block)), scope)

    def _search_rows(self, queries: Floats32, rows: Ints | slice, k: int, scope: Scope) -> Found:
        return search(
            queries,
            self._vectors[rows],
            scope.ids[rows],
            k,
            engine=scope.engine,
            num_threads=scope.num_threads,
        )


def append_rows(array: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Append rows to the array, in the same memory where the system can extend it (mremap).

    The array is then never in memory twice.
    """
    owned = _own(array)
    count = len(owned)
    owned.resize((count + len(rows), *owned.shape[1:]), refcheck=False)
    owned[count:] = rows
    return owned


def keep_rows(array: NDArray[Any], kept: Bools) -> NDArray[Any]:
    """Move the kept rows of an array forward, in the same memory, and cut off the rest."""
    owned = _own(array)
    rows = np.flatnonzero(kept)
    for start in range(0, len(rows), SUBSET_BLOCK):
        block = rows[start : start + SUBSET_BLOCK]
        owned[start : start + len(block)] = owned[block]
    owned.resize((len(rows), *owned.shape[1:]), refcheck=False)
    return owned


def _own(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array itself, or a copy where it shares its memory or cannot be written."""
    is_resizable = array.flags.owndata and array.flags.writeable
    return array if is_resizable else array.copy()
