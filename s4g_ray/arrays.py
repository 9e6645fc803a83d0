"""Define the array types, and work on ranges, groups and samples of rows.

Loads without numba: compiled lookups of ids are in row_lookup.py.
"""

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
LOOKUP_ROWS = 1 << 20  # ids that are looked up at once: bounds the memory beside them


def by_rows(
    function: Callable[[int, int], Result], count: int, num_threads: int | None = None
) -> list[Result]:
    """Call function(first, last) for consecutive ranges of `count` rows, one range a thread.

    Uses one thread a core when num_threads is None. Returns the results in the order of the rows.
    """
    num_ranges = min(num_threads or os.cpu_count() or 1, max(count, 1))
    if num_ranges == 1:
        return [function(0, count)]
    edges = [count * i // num_ranges for i in range(num_ranges + 1)]
    with ThreadPoolExecutor(num_ranges) as pool:
        return list(pool.map(function, edges[:-1], edges[1:]))


def group(*columns: NDArray[Any]) -> Ints:
    """Number the groups of equal rows: one or more columns[N] -> groups[N], counted from 0.

    Two rows are in the same group when they are equal in every column.
    """
    order = np.lexsort(columns)
    changed = np.zeros(len(order), dtype=bool)
    for column in columns:
        ordered = column[order]
        changed[1:] |= ordered[1:] != ordered[:-1]
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = np.cumsum(changed)
    return groups


def spread_rows(num_rows: int, size: int, seed: int) -> Ints:
    """Draw one row from each of `size` equal ranges of num_rows rows -> rows[size], ascending.

    Returns all rows when `size` is at least num_rows.
    """
    if size >= num_rows:
        return np.arange(num_rows)
    edges = num_rows * np.arange(size + 1) // size
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def space_rows(num_rows: int, size: int) -> Ints:
    """Return at most `size` rows of num_rows at equal distances, from the first to the last one.

    Returns all rows when `size` is at least num_rows.
    """
    if size >= num_rows:
        return np.arange(num_rows)
    return np.unique(np.linspace(0, num_rows - 1, size).astype(np.int64))


def is_among(values: Ints, ascending: Ints) -> Bools:
    """Return which of values[N] are among ascending[M]. Needs little memory beside the answer."""
    found = np.zeros(len(values), dtype=bool)
    if not len(ascending):
        return found
    for start in range(0, len(values), LOOKUP_ROWS):
        part = values[start : start + LOOKUP_ROWS]
        at = np.minimum(np.searchsorted(ascending, part), len(ascending) - 1)
        found[start : start + LOOKUP_ROWS] = ascending[at] == part
    return found
