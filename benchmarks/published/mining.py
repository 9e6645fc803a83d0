"""Mine as published: the full similarity matrix for the top-k, and again for the train recall.

Written anew from the description of the method.

Source of the form: Sample4Geo (arXiv 2303.11851), dynamic similarity sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 1000  # queries in one product


def full_similarity(queries: Tensor, references: Tensor) -> Tensor:
    """Compute similarity[Q, R] of queries[Q, D] and references[R, D] in blocks, then join them."""
    blocks = [
        queries[start : start + STEP] @ references.T for start in range(0, len(queries), STEP)
    ]
    return torch.cat(blocks)


def nearest_places(queries: Tensor, references: Tensor, k: int) -> dict[int, list[int]]:
    """Find the k nearest other references of each query; its own is that of the same row."""
    nearest = torch.topk(full_similarity(queries, references), k + 1, dim=1).indices
    neighbors = {}
    for query, row in enumerate(nearest.tolist()):
        neighbors[query] = [reference for reference in row if reference != query][:k]
    return neighbors


def train_recall(
    queries: Tensor, references: Tensor, ranks: tuple[int, ...] = (1, 5, 10)
) -> dict[int, float]:
    """Return, for each rank, the share of queries whose own reference is at that rank or better."""
    similarity = full_similarity(queries, references)
    hits = dict.fromkeys(ranks, 0)
    for query in range(len(queries)):
        above = int((similarity[query] > similarity[query, query]).sum())
        for rank in ranks:
            hits[rank] += above < rank
    return {rank: count / len(queries) for rank, count in hits.items()}
