"""Hard-negative mining: embeddings -> index -> NeighborGraph of the visually nearest places."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from s4g_ray.embedding import EmbeddingTable
from s4g_ray.index import IndexService
from s4g_ray.neighbors import NeighborGraph, PlacePairs
from s4g_ray.progress import Update, ignore

Ints = NDArray[np.int64]


def mine_neighbors(
    service: IndexService,
    version: int,
    queries: EmbeddingTable,
    reference_ids: Ints,
    reference_places: Ints,
    *,
    k: int,
    block: int,
    exclusions: PlacePairs | None = None,
    on_progress: Update = ignore,
) -> NeighborGraph:
    """Each query place's k visually nearest other places, from an indexed version of the references.

    reference_ids[R] sorted, reference_places[R]: the indexed references. Asks for enough references that k
    other places are among them that `exclusions` do not bar, whatever place has the most. Source: dynamic
    similarity sampling, arXiv 2303.11851, section 3.3.
    """
    per_place = int(np.unique(reference_places, return_counts=True)[1].max())
    barred = exclusions.most if exclusions else 0
    wanted = min((k + 1 + barred) * per_place, len(reference_ids))
    places, scores = [], []
    for start in range(0, len(queries), block):
        ids, found = service.search(version, queries.vectors[start : start + block], wanted)
        places.append(reference_places[np.searchsorted(reference_ids, ids)])
        scores.append(found)
        on_progress(min(start + block, len(queries)), len(queries))
    return merge_neighbors(queries.place_ids, np.concatenate(places), np.concatenate(scores), k, exclusions)


def merge_neighbors(
    query_places: Ints,
    found_places: Ints,
    scores: NDArray[np.float32],
    k: int,
    exclusions: PlacePairs | None = None,
) -> NeighborGraph:
    """query_places[M], found_places[M, n], scores[M, n] -> the k best other places of each place.

    The query's own place is removed, and what `exclusions` bar from it (false negatives). A place found through
    several queries (a tile with two panoramas) or references counts once, with its best score; equal scores are
    ordered by place_id.
    """
    source = np.repeat(query_places, found_places.shape[1])
    target, score = found_places.ravel(), scores.ravel()
    other = source != target
    if exclusions is not None:
        other &= ~exclusions.contains(source, target)
    source, target, score = source[other], target[other], score[other]
    order = np.lexsort((-score, target, source))
    source, target, score = source[order], target[order], score[order]
    first = np.ones(len(source), dtype=bool)
    first[1:] = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
    source, target, score = source[first], target[first], score[first]
    order = np.lexsort((target, -score, source))
    source, target, score = source[order], target[order], score[order]
    places = np.unique(query_places)
    starts = np.searchsorted(source, places)
    rank = np.arange(len(source)) - starts[np.searchsorted(places, source)]
    row = np.searchsorted(places, source)
    kept = rank < k
    neighbors = np.full((len(places), k), -1, dtype=np.int64)
    neighbor_scores = np.full((len(places), k), -np.inf, dtype=np.float32)
    neighbors[row[kept], rank[kept]] = target[kept]
    neighbor_scores[row[kept], rank[kept]] = score[kept]
    return NeighborGraph(places, neighbors, neighbor_scores)
