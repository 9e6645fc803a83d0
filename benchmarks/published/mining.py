"""Mining as published, written anew: the full similarity matrix for the top-k, and once more for the train recall.

Source of the form: Sample4Geo (arXiv 2303.11851), dynamic similarity sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 1000  # queries in one product


def full_similarity(queries: Tensor, references: Tensor) -> Tensor:
    """queries[Q, D], references[R, D] -> [Q, R], from blocks that are concatenated."""
    blocks = [
        queries[start : start + STEP] @ references.T for start in range(0, len(queries), STEP)
    ]
    return torch.cat(blocks)


def nearest_places(queries: Tensor, references: Tensor, k: int) -> dict[int, list[int]]:
    """The k nearest other references of each query, whose own is that of the same row."""
    nearest = torch.topk(full_similarity(queries, references), k + 1, dim=1).indices
    neighbors = {}
    for query, row in enumerate(nearest.tolist()):
        neighbors[query] = [reference for reference in row if reference != query][:k]
    return neighbors


def train_recall(
    queries: Tensor, references: Tensor, ranks: tuple[int, ...] = (1, 5, 10)
) -> dict[int, float]:
    """Share of queries whose own reference is among the first so many."""
    similarity = full_similarity(queries, references)
    hits = dict.fromkeys(ranks, 0)
    for query in range(len(queries)):
        above = int((similarity[query] > similarity[query, query]).sum())
        for rank in ranks:
            hits[rank] += above < rank
    return {rank: count / len(queries) for rank, count in hits.items()}
