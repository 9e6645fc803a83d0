"""Count the hard negatives of batches: the nearest neighbors of a place that share its batch."""

from __future__ import annotations

import os

import numba
import numpy as np

from s4g_ray.arrays import Rows32, by_rows


def count_hard(
    places: Rows32, rows: Rows32, num_hard: int, *, num_threads: int | None = None
) -> int:
    """Count, over all batches places[B, b], the `num_hard` nearest of each place in its batch.

    rows[P, K] are the neighbors of each place, nearest first. Each thread (None: one a CPU, at
    most four) takes 4 P bytes.
    """
    num_threads = num_threads or min(os.cpu_count() or 1, 4)

    def count_range(first: int, last: int) -> int:
        return int(_count_hard(first, last, places, rows, num_hard))

    return sum(by_rows(count_range, len(places), num_threads))


@numba.njit(cache=True, nogil=True)
def _count_hard(
    start: int, stop: int, places: Rows32, rows: Rows32, num_hard: int
) -> int:  # pragma: no cover (compiled)
    """Count within the batches start..stop - 1."""
    # the last batch that holds each place, at place + 1; entry 0 takes all negative rows
    last_batch = np.full(len(rows) + 1, -1, np.int32)
    total = 0
    for batch in range(start, stop):
        for slot in range(places.shape[1]):
            last_batch[places[batch, slot] + 1] = batch
        for slot in range(places.shape[1]):
            for i in range(min(num_hard, rows.shape[1])):
                total += int(last_batch[max(rows[places[batch, slot], i], -1) + 1] == batch)
    return total
