"""Array types; groups of equal rows, spread samples, ranges of rows over threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats32 = NDArray[np.float32]
Floats64 = NDArray[np.float64]
Floats = Floats32 | Floats64
Bools = NDArray[np.bool_]
Rows32 = NDArray[np.int32]  # row numbers, where memory counts
Result = TypeVar("Result")


def by_rows(
    function: Callable[[int, int], Result], count: int, num_threads: int | None = None
) -> list[Result]:
    """function(first, last) over consecutive ranges of `count` rows, one a thread (none: one a core); in order."""
    ranges = min(num_threads or os.cpu_count() or 1, max(count, 1))
    edges = [count * i // ranges for i in range(ranges + 1)]
    if ranges == 1:
        return [function(0, count)]
    with ThreadPoolExecutor(ranges) as pool:
        return list(pool.map(function, edges[:-1], edges[1:]))


def group(*columns: NDArray[Any]) -> Ints:
    """Columns of N (at least one) -> groups[N], numbered from 0: equal where all columns are."""
    order = np.lexsort(columns)
    changed = np.zeros(len(order), dtype=bool)
    for column in columns:
        ordered = column[order]
        changed[1:] |= ordered[1:] != ordered[:-1]
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = np.cumsum(changed)
    return groups


def spread_rows(num_rows: int, size: int, seed: int) -> Ints:
    """At most `size` of num_rows rows, rising: one drawn from each of `size` equal ranges."""
    if size >= num_rows:
        return np.arange(num_rows)
    edges = num_rows * np.arange(size + 1) // size
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])
