"""Evaluate as published: all scores in memory, one query after the other, every query sorted.

Written from the description of the method, on as many threads as torch has.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from s4g_ray.arrays import Floats, Ints

QUERIES = 1000  # queries in one product


def full_matrix(queries: Floats, references: Floats) -> NDArray[np.float32]:
    """Compute scores[Q, R] by cosine, joined from blocks of queries."""
    q = torch.nn.functional.normalize(torch.from_numpy(queries), dim=1)
    r = torch.nn.functional.normalize(torch.from_numpy(references), dim=1)
    blocks = [q[start : start + QUERIES] @ r.T for start in range(0, len(q), QUERIES)]
    return np.asarray(torch.cat(blocks).numpy())


def recalls(
    queries: Floats, references: Floats, query_places: Ints, reference_places: Ints
) -> dict[str, float]:
    """Compute recall@1, 5, 10 and 1%: count the references that score higher than the own one."""
    scores = full_matrix(queries, references)
    row_of = {place: row for row, place in enumerate(reference_places.tolist())}
    ks = {"recall@1": 1, "recall@5": 5, "recall@10": 10, "recall@1%": len(references) // 100}
    hits = dict.fromkeys(ks, 0)
    for query, place in enumerate(query_places.tolist()):
        higher = int((scores[query] > scores[query, row_of[place]]).sum())
        for name, k in ks.items():
            hits[name] += higher < k
    return {name: count / len(query_places) for name, count in hits.items()}


def average_precision(
    queries: Floats, references: Floats, query_places: Ints, reference_places: Ints
) -> float:
    """Compute mean average precision (trapezoid): score and sort all references of each query."""
    q = torch.nn.functional.normalize(torch.from_numpy(queries), dim=1)
    r = torch.nn.functional.normalize(torch.from_numpy(references), dim=1)
    precisions = [
        _average_precision(r @ query, place, reference_places)
        for query, place in zip(q, query_places, strict=True)
    ]
    return float(np.mean(precisions))


def average_precision_of_matrix(
    queries: Floats, references: Floats, query_places: Ints, reference_places: Ints
) -> float:
    """Compute the same from one product for all queries, to show the cost of sorting alone."""
    scores = torch.from_numpy(full_matrix(queries, references))
    precisions = [
        _average_precision(row, place, reference_places)
        for row, place in zip(scores, query_places, strict=True)
    ]
    return float(np.mean(precisions))


def _average_precision(scores: torch.Tensor, place: int, reference_places: Ints) -> float:
    order = np.argsort(scores.numpy())[::-1]
    positions = np.flatnonzero(reference_places[order] == place)
    area = 0.0
    count = len(positions)
    for found, position in enumerate(positions):
        before = found / position if position else 1.0
        area += (before + (found + 1) / (position + 1)) / 2 / count
    return area
