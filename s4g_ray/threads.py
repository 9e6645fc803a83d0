"""Rows of an array divided among threads, for compiled kernels that release the GIL.

numba's own parallel loops are not used: its OpenMP layer kills a process that forks after it, and its other layer
one whose threads use it at the same time; Ray's workers may do both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def by_rows(function: Callable[[int, int], Result], count: int, num_threads: int | None = None) -> list[Result]:
    """function(first, last) over consecutive ranges of `count` rows, one a thread (none: one a core); in order."""
    ranges = min(num_threads or os.cpu_count() or 1, max(count, 1))
    edges = [count * i // ranges for i in range(ranges + 1)]
    if ranges == 1:
        return [function(0, count)]
    with ThreadPoolExecutor(ranges) as pool:
        return list(pool.map(function, edges[:-1], edges[1:]))
