"""Define Store, the interface of what VectorIndex keeps vectors in, and Scope.

Vectors have length 1 and are addressed by row number; the metric is the inner product. `effort` is
the search effort: nprobe lists or ef_search candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np

from s4g_ray.arrays import Bools, Floats32, Ints
from s4g_ray.index.exact_search import Engine
from s4g_ray.index.top_k import Found, TopK

SUBSET_BLOCK = 16_384  # rows that are gathered at once to search some rows exactly


@dataclass(frozen=True)
class Scope:
    """The rows that a search may find, and how it runs."""

    ids: Ints  # of all rows: equal scores are ordered by lower id
    rows: Ints | None = None  # ascending; None: all
    engine: Engine = "auto"  # of exact search
    num_threads: int | None = None


class Store(Protocol):
    """Vectors of an index, by row."""

    effort: int | None  # of a search; None: it compares a query with every vector

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    @property
    def max_effort(self) -> int:
        """The effort above which a search visits no more."""
        ...

    def add(self, vectors: Floats32) -> None:
        """Append vectors[n, D]."""
        ...

    def keep(self, rows: Bools) -> bool:
        """Drop the rows that are False and number the others anew, in order.

        Returns False, and changes nothing, where rows cannot be dropped one by one.
        """
        ...

    def search(self, queries: Floats32, k: int, effort: int | None, scope: Scope) -> Found:
        """Search queries[M, D] -> rows[M, k], scores[M, k], best first; k within the scope's rows.

        Row -1 and score -inf stand where the effort leads to fewer than k rows.
        """
        ...

    def search_all(self, queries: Floats32, k: int, scope: Scope) -> Found:
        """Search as `search` does, but compare with every row of the scope, as it is stored."""
        ...

    def write(self, file: BinaryIO) -> None:
        """Append the store to a file."""
        ...


def merge_blocks(
    num_queries: int, k: int, ids: Ints, blocks: Iterable[tuple[Ints, Found]]
) -> Found:
    """Merge answers of blocks of rows into the k best: rows[M, k], scores[M, k], ties by lower id.

    blocks: the rows[n] of each block, and its answer, which numbers them from 0. All blocks
    together have at least k results a query.
    """
    best = TopK(num_queries, k, ids, lambda work, count: work(slice(0, count)))
    for rows, (places, scores) in blocks:
        best.fold(scores, rows[places])
    return best.sorted()


def cut_blocks(rows: Ints) -> Iterable[Ints]:
    """Cut rows into blocks that are gathered at once."""
    for start in range(0, len(rows), SUBSET_BLOCK):
        yield rows[start : start + SUBSET_BLOCK]


def mark_missing(rows: Ints, scores: Floats32) -> Found:
    """Set the score of missing results, which faiss gives as row -1, to -inf, in place."""
    scores[rows < 0] = -np.inf
    return rows, scores


def pick_allowed(scope: Scope, count: int) -> Ints:
    """Return the rows of a scope, of `count` in the store."""
    return np.arange(count) if scope.rows is None else scope.rows


def selector_of(library: Any, rows: Ints, count: int) -> Any:
    """Make faiss's selector of some of `count` rows: a bit a row."""
    allowed = np.zeros(count, bool)
    allowed[rows] = True
    return library.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
