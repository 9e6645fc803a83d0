"""Find the first few references of each query in a gallery that is read part by part."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from s4g_ray.arrays import Floats32, Ints

QUERIES_AT_ONCE = 1024
ROWS_AT_ONCE = 16_384  # references: with the queries above, 64 MB of scores


def find_top_references(queries: Floats32, parts: Iterable[Floats32], count: int) -> Ints:
    """queries[Q, D], parts of vectors[n, D] -> top[Q, k], rows of the gallery, the best first.

    By inner product in float32; k is `count`, or the number of references. Of equal scores the
    earlier row comes first.
    """
    top: Ints = np.zeros((len(queries), 0), np.int64)
    best = np.zeros((len(queries), 0), np.float32)
    first = 0
    for part in parts:
        for start in range(0, len(part), ROWS_AT_ONCE):
            vectors = part[start : start + ROWS_AT_ONCE]
            kept = min(count, top.shape[1] + len(vectors))
            tops = np.empty((len(queries), kept), np.int64)
            bests = np.empty((len(queries), kept), np.float32)
            rows = np.arange(first + start, first + start + len(vectors))
            for at in range(0, len(queries), QUERIES_AT_ONCE):
                block = slice(at, at + QUERIES_AT_ONCE)
                scores = np.hstack([best[block], queries[block] @ vectors.T])
                known = np.hstack([top[block], np.broadcast_to(rows, (len(scores), len(rows)))])
                order = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
                tops[block] = np.take_along_axis(known, order, axis=1)
                bests[block] = np.take_along_axis(scores, order, axis=1)
            top = tops
            best = bests
        first += len(part)
    return top
