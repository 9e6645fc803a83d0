"""Vectors to index, and a slow search that compares every pair."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.index.plan import Kind

Array = NDArray[Any]
KINDS: tuple[Kind, ...] = ("flat", "sqfp16", "ivf_sq8", "ivf_rabitq", "hnsw")


def brute_force(
    vectors: Array, ids: Array, queries: Array, k: int
) -> tuple[list[list[int]], Array]:
    """Return the ids and the cosines of the k nearest vectors of each query, best first."""
    found = []
    scores = []
    for q in queries.astype(np.float64):
        cosine = [
            (float(q @ v / np.linalg.norm(q) / np.linalg.norm(v)), i)
            for v, i in zip(vectors, ids, strict=True)
        ]
        best = sorted(cosine, key=lambda pair: -pair[0])[:k]
        found.append([int(i) for _, i in best])
        scores.append([s for s, _ in best])
    return found, np.array(scores)


def data() -> tuple[Array, Array, Array]:
    """Return vectors[200, 24], ids in no order, and queries[30, 24]."""
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(200, 24)).astype(np.float32) * 7,
        rng.permutation(10_000)[:200],
        rng.normal(size=(30, 24)),
    )


def clustered(count: int, dim: int = 32, seed: int = 0) -> Array:
    """Return vectors around 40 centres, the same for every seed."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, dim))
    return (centres[rng.integers(0, 40, count)] + 0.5 * rng.normal(size=(count, dim))).astype(
        np.float32
    )


def recall(found: Array, wanted: list[list[int]]) -> float:
    """Return the mean share of wanted ids that are found."""
    return float(
        np.mean(
            [len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), wanted, strict=True)]
        )
    )
