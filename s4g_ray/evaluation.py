"""Retrieval metrics: exact ranks block by block, ties against the query, in memory O(block * R)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from s4g_ray.errors import RunError
from s4g_ray.neighbors import metres_between

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]
BLOCK_SCORES = 4_000_000  # scores in one block of the matrix product
NEAR_TIE = 1e-5  # scores closer than this are compared in float64: float32 products differ by their place in a block
PAIRS_PER_CHUNK = 8192


@dataclass(frozen=True)
class Ranks:
    """For each query: ranks[Q], the 1-based rank of its best reference (0: none in the gallery); top[Q], the row
    of the reference that scores highest."""

    ranks: Ints
    top: Ints


def retrieval_ranks(
    query_embeddings: Floats, reference_embeddings: Floats, query_places: Ints, reference_places: Ints
) -> Ranks:
    """Ranks by cosine: query_embeddings[Q, D], reference_embeddings[R, D], places [Q] and [R].

    A query's rank is one more than the number of references of other places that score at least as high as
    its own best one: ties count against it. Raises RunError for non-finite embeddings, ValueError for
    shapes that do not fit.
    """
    queries = _normalise(query_embeddings, query_places, "query")
    references = _normalise(reference_embeddings, reference_places, "reference")
    if queries.shape[1] != references.shape[1]:
        raise ValueError(f"D differs: queries {queries.shape[1]}, references {references.shape[1]}")
    ranks = np.zeros(len(queries), dtype=np.int64)
    top = np.zeros(len(queries), dtype=np.int64)
    block = max(1, BLOCK_SCORES // max(len(references), 1))
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        scores = queries[rows] @ references.T
        own = query_places[rows, None] == reference_places[None, :]
        top[rows] = scores.argmax(axis=1)
        ranks[rows] = _block_ranks(scores, own, queries[rows], references)
    return Ranks(ranks, top)


def _normalise(embeddings: Floats, places: Ints, what: str) -> NDArray[np.float32]:
    if embeddings.ndim != 2 or len(embeddings) != len(places):
        raise ValueError(f"{what} embeddings have shape {embeddings.shape}, for {len(places)} places")
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise RunError(f"{len(bad)} {what} embeddings are not finite; the first is row {bad[0]}")
    wide = embeddings.astype(np.float32)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.maximum(norms, np.finfo(np.float32).tiny), dtype=np.float32)


def _block_ranks(
    scores: NDArray[np.float32], own: NDArray[np.bool_], queries: Floats, references: Floats
) -> NDArray[np.int64]:
    best = np.where(own, scores, -np.inf).max(axis=1, initial=-np.inf)
    above = (~own & (scores > best[:, None] + NEAR_TIE)).sum(axis=1)
    row, column = np.nonzero(np.abs(scores - best[:, None]) <= NEAR_TIE)
    if len(row):
        exact = _exact_scores(queries, references, row, column)
        is_own = own[row, column]
        exact_best = np.full(len(scores), -np.inf)
        np.maximum.at(exact_best, row[is_own], exact[is_own])
        tied = ~is_own & (exact >= exact_best[row])
        above += np.bincount(row[tied], minlength=len(scores))
    return np.where(own.any(axis=1), above + 1, 0)


def _exact_scores(queries: Floats, references: Floats, row: Ints, column: Ints) -> NDArray[np.float64]:
    """Inner products of pairs in float64, each summed in the same order: equal vectors give equal scores."""
    scores = np.empty(len(row))
    for start in range(0, len(row), PAIRS_PER_CHUNK):
        chunk = slice(start, start + PAIRS_PER_CHUNK)
        product = queries[row[chunk]].astype(np.float64) * references[column[chunk]]
        scores[chunk] = product.sum(axis=1)
    return scores


def retrieval_metrics(
    query_embeddings: Floats,
    reference_embeddings: Floats,
    query_places: Ints,
    reference_places: Ints,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    query_latlon: NDArray[np.float64] | None = None,
    reference_latlon: NDArray[np.float64] | None = None,
) -> dict[str, float]:
    """Recall@k for each of `ranks`, recall@1%, and with latlon [Q, 2] and [R, 2] in degrees the median error.

    Fractions are in 0..1; `recall@1%` counts ranks up to max(1, R // 100). Queries without a reference in the
    gallery are left out and counted in `queries_without_reference`. `median_error_m` is the great-circle
    distance from a query to the reference that scores highest, over queries and references with coordinates.
    Raises RunError for non-finite embeddings and when no query has a reference.
    """
    found = retrieval_ranks(query_embeddings, reference_embeddings, query_places, reference_places)
    counted = found.ranks > 0
    if not counted.any():
        raise RunError("no query has a reference in the gallery: nothing to evaluate")
    hits = {f"recall@{k}": float((found.ranks[counted] <= k).mean()) for k in ranks}
    percent = max(1, len(reference_embeddings) // 100)
    hits["recall@1%"] = float((found.ranks[counted] <= percent).mean())
    if query_latlon is not None and reference_latlon is not None:
        nearest = reference_latlon[found.top]
        metres = metres_between(query_latlon[:, 0], query_latlon[:, 1], nearest[:, 0], nearest[:, 1])[counted]
        if np.isfinite(metres).any():
            hits["median_error_m"] = float(np.nanmedian(metres))
    hits["queries"] = float(counted.sum())
    hits["queries_without_reference"] = float((~counted).sum())
    hits["references"] = float(len(reference_embeddings))
    return hits
