"""Refuse vectors and ids that cannot be indexed or searched."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Ints


def check_vectors(vectors: NDArray[Any], dim: int) -> None:
    """Raise ValueError for vectors that are not [N, dim] of a float type."""
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"vectors{list(vectors.shape)} do not fit an index of D={dim}")
    if vectors.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(
            f"vectors of {vectors.dtype} are not float16, float32 or float64; convert them"
        )


def check_ids(ids: Ints, count: int) -> None:
    """Raise ValueError for ids that are not `count` different numbers from 0 to 2**63 - 1."""
    if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"ids{list(ids.shape)} of {ids.dtype} are not one whole number for each of"
            f" {count} vectors"
        )
    if count and (ids.min() < 0 or len(np.unique(ids)) != count):
        raise ValueError("ids must be unique and not negative")
    if count and ids.max() > np.iinfo(np.int64).max:
        raise ValueError(f"id {ids.max()} is above {np.iinfo(np.int64).max}, the largest of int64")


def whole_ids(ids: Any) -> Ints:
    """Return ids[n] as int64. Raises ValueError where they are no list of whole numbers.

    A cast would turn 7.5 into another id.
    """
    values = np.asarray(ids)
    if values.ndim != 1 or (len(values) and not np.issubdtype(values.dtype, np.integer)):
        raise ValueError(
            f"ids{list(values.shape)} of {values.dtype} are no list of whole numbers; convert them"
        )
    return np.asarray(values, np.int64)


def check_finite(vectors: NDArray[Any], first: int) -> None:
    """Raise ValueError for vectors that are not finite in float32; `first`: number of row 0."""
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite here
        bad = np.flatnonzero(~np.isfinite(vectors.astype(np.float32, copy=False)).all(axis=1))
    if len(bad):
        raise ValueError(f"vectors are not finite; the first is row {first + bad[0]}")
