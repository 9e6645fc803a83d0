"""Compiled loops over ranked candidates: filtering, merging, comparing lists of places."""

from __future__ import annotations

import numba
import numpy as np

from s4g_ray.arrays import Bools, Floats32, Ints

_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


@numba.njit(cache=True, nogil=True)
def filter_rows(
    own: Ints,
    places: Ints,
    scores: Floats32,
    starts: Ints,
    ends: Ints,
    partners: Ints,
    near: Bools,
    max_score: np.float32,
    margin: float,
    range_min: int,
    neighbors: Ints,
    kept_scores: Floats32,
    dropped: Ints,
    num: Ints,
    above: Ints,
    own_rank: Ints,
) -> None:  # pragma: no cover (compiled)
    """Fill the arrays of Kept, from `neighbors` on, for queries of places own[M] and candidates of places[M, n].

    partners[starts:ends]: a query's semi-positives, ascending; near[M, n]; margin: below 0 for none.
    """
    k, table, marks = neighbors.shape[1], *new_set(places.shape[1])
    for i in range(len(places)):
        own_rank[i], positive, limit = find_own(own[i], places[i], scores[i], margin)
        semi, rank = partners[starts[i] : ends[i]], 0
        for j in range(places.shape[1]):
            place, score = places[i, j], scores[i, j]
            if num[i] == k or place < 0:
                break
            if not add(table, marks, i + 1, place):
                continue
            reason = 0 if place == own[i] else 1 if holds(semi, place) else 2 if near[i, j] else -1
            if reason < 0:
                rank += 1
                reason = (
                    3
                    if score > max_score
                    else 4
                    if score > limit
                    else 5
                    if rank <= range_min
                    else -1
                )
            if reason >= 0:
                dropped[i, reason] += 1
                continue
            above[i] += score > positive or own_rank[i] == 0
            insert(neighbors[i], kept_scores[i], num[i], place, score)
            num[i] += 1


@numba.njit(cache=True, nogil=True)
def find_own(
    own: int, places: Ints, scores: Floats32, margin: float
) -> tuple[int, np.float32, np.float32]:  # pragma: no cover (compiled)
    """The rank of the own place's best reference (0: not found), its score, and the margin's limit."""
    positive, rank = -np.float32(np.inf), 0
    for j in range(len(places)):
        if places[j] < 0 or (rank > 0 and scores[j] < positive):
            break
        if places[j] == own and rank == 0:
            positive, rank = scores[j], j + 1
        elif places[j] != own and rank > 0:
            rank += 1
    if margin < 0:
        return rank, positive, np.float32(np.inf)
    return rank, positive, positive if rank == 0 else np.float32(positive - abs(positive) * margin)


@numba.njit(cache=True, nogil=True)
def insert(
    places: Ints, scores: Floats32, count: int, place: int, score: float
) -> None:  # pragma: no cover (compiled)
    """Append what scores no higher than all that is there; among equal scores, in order of the places."""
    at = count
    while at > 0 and scores[at - 1] == score and places[at - 1] > place:
        places[at], scores[at] = places[at - 1], scores[at - 1]
        at -= 1
    places[at], scores[at] = place, score


@numba.njit(cache=True, nogil=True)
def holds(ascending: Ints, value: int) -> bool:  # pragma: no cover (compiled)
    """Whether a value is among others."""
    at = np.searchsorted(ascending, value)
    return bool(at < len(ascending) and ascending[at] == value)


@numba.njit(cache=True, nogil=True)
def new_set(size: int) -> tuple[Ints, Ints]:  # pragma: no cover (compiled)
    """A hash table for `size` places: those beside which a mark stands are in the set of that mark."""
    slots = 16
    while slots < 2 * size:
        slots *= 2
    return np.zeros(slots, np.int64), np.zeros(slots, np.int64)


@numba.njit(cache=True, nogil=True)
def add(table: Ints, marks: Ints, mark: int, place: int) -> bool:  # pragma: no cover (compiled)
    """Add a place to the set of a mark, above all marks before it; whether it was not there."""
    mask = len(table) - 1
    # the high bits, as ids may differ in theirs alone: regions or cells of a grid are often kept there
    at = np.int64((np.uint64(place) * _HASH) >> np.uint64(32)) & mask
    while marks[at] == mark:
        if table[at] == place:
            return False
        at = (at + 1) & mask
    table[at], marks[at] = place, mark
    return True


@numba.njit(cache=True, nogil=True)
def merge_rows(
    order: Ints,
    starts: Ints,
    neighbors: Ints,
    scores: Floats32,
    merged: Ints,
    merged_scores: Floats32,
) -> None:  # pragma: no cover (compiled)
    """merged[P, k]: the best of the rows order[starts[p]:starts[p + 1]] of neighbors[M, n], -1 pads."""
    k, mark = merged.shape[1], 0
    table, marks = new_set(k)
    best, best_scores = np.empty(k, np.int64), np.empty(k, np.float32)
    for place in range(len(merged)):
        for row in order[starts[place] : starts[place + 1]]:
            mark += 1
            count = merge_two(
                merged[place],
                merged_scores[place],
                neighbors[row],
                scores[row],
                best,
                best_scores,
                table,
                marks,
                mark,
            )
            merged[place, :count], merged_scores[place, :count] = best[:count], best_scores[:count]


@numba.njit(cache=True, nogil=True)
def merge_two(
    a: Ints,
    a_scores: Floats32,
    b: Ints,
    b_scores: Floats32,
    best: Ints,
    best_scores: Floats32,
    table: Ints,
    marks: Ints,
    mark: int,
) -> int:  # pragma: no cover (compiled)
    """The best of two lists, a place that stands in both once; returns how many there are."""
    i, j, count = 0, 0, 0
    while count < len(best):
        more_a, more_b = i < len(a) and a[i] >= 0, j < len(b) and b[j] >= 0
        if not more_a and not more_b:
            break
        if more_a and (
            not more_b or a_scores[i] > b_scores[j] or (a_scores[i] == b_scores[j] and a[i] <= b[j])
        ):
            place, score = a[i], a_scores[i]
            i += 1
        else:
            place, score = b[j], b_scores[j]
            j += 1
        if add(table, marks, mark, place):
            best[count], best_scores[count] = place, score
            count += 1
    return count


@numba.njit(cache=True, nogil=True)
def count_shared_rows(neighbors: Ints, previous: Ints) -> int:  # pragma: no cover (compiled)
    """How many of neighbors[P, k] stand in the same row of previous[P, n]; pads (-1) count for nothing."""
    shared = 0
    for i in range(len(neighbors)):
        row = np.sort(previous[i])
        for place in neighbors[i]:
            shared += place >= 0 and holds(row, place)
    return shared
