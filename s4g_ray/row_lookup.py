"""Rows of ids, compiled. Apart from arrays.py, which must load without numba."""

from __future__ import annotations

import numba
import numpy as np

from s4g_ray.arrays import Ints


def rows_of(ids: Ints, wanted: Ints) -> Ints:
    """ids[N], ascending, wanted[...] -> the row of each wanted id, -1 for those that are not there."""
    return np.asarray(_find_rows(ids, np.ascontiguousarray(wanted).ravel()).reshape(wanted.shape))


@numba.njit(cache=True, nogil=True)
def _find_rows(ids: Ints, wanted: Ints) -> Ints:  # pragma: no cover (compiled)
    rows = np.full(len(wanted), -1, dtype=np.int64)
    if len(ids) == 0:
        return rows
    first, last = float(ids[0]), float(ids[-1])
    step = (len(ids) - 1) / max(last - first, 1.0)
    for i in range(len(wanted)):
        if wanted[i] < ids[0] or wanted[i] > ids[-1]:
            continue
        # ids without gaps are found at once: 4 times as fast as a binary search among 35,000
        at = min(int((float(wanted[i]) - first) * step), len(ids) - 1)
        if ids[at] != wanted[i]:
            at = np.searchsorted(ids, wanted[i])
        if ids[at] == wanted[i]:
            rows[i] = at
    return rows
