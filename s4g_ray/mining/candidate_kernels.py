"""Compiled loops over ranked candidates: filter them, merge them, compare lists of places.

Names and shapes, for M queries with n candidates each, of which k are kept:

own[M]                       place of each query
places[M, n], scores[M, n]   candidates, best first; -1 pads
partners[starts[i]:ends[i]]  semi-positives of query i's place, ascending
near[M, n]                   whether a candidate lies within the exclusion radius
neighbors[M, k], kept_scores[M, k], dropped[M, 6], num[M], above[M], own_rank[M]
                             the fields of candidates.Kept
table[S], marks[S]           a hash set of places: table[s] belongs to it where marks[s] is its mark
"""

from __future__ import annotations

import numba
import numpy as np

from s4g_ray.arrays import Bools, Floats32, Ints

# positions in candidates.REASONS
_OWN = 0
_SEMI_POSITIVE = 1
_NEAR = 2
_MAX_SCORE = 3
_RELATIVE_MARGIN = 4
_RANGE_MIN = 5
_KEPT = -1
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
    """Filter the candidates of each query into the fields of Kept, `neighbors` to `own_rank`.

    margin: relative_margin, negative for none.
    """
    k = neighbors.shape[1]
    table, marks = new_set(places.shape[1])
    for i in range(len(places)):
        own_rank[i], positive, limit = find_own(own[i], places[i], scores[i], margin)
        semi_positives = partners[starts[i] : ends[i]]
        rank = 0
        for j in range(places.shape[1]):
            place = places[i, j]
            score = scores[i, j]
            if num[i] == k or place < 0:
                break
            if not add_to_set(table, marks, i + 1, place):
                continue
            reason = find_exclusion(own[i], place, semi_positives, near[i, j])
            if reason == _KEPT:
                rank += 1
                reason = find_limit(score, max_score, limit, rank, range_min)
            if reason != _KEPT:
                dropped[i, reason] += 1
                continue
            above[i] += score > positive or own_rank[i] == 0
            insert_neighbor(neighbors[i], kept_scores[i], num[i], place, score)
            num[i] += 1


@numba.njit(cache=True, nogil=True)
def find_own(
    own: int, places: Ints, scores: Floats32, margin: float
) -> tuple[int, np.float32, np.float32]:  # pragma: no cover (compiled)
    """Return the rank of the own place's best reference, its score, and the margin's limit.

    The rank is 0 where no reference of the own place is among the candidates.
    """
    positive = -np.float32(np.inf)
    rank = 0
    for j in range(len(places)):
        if places[j] < 0 or (rank > 0 and scores[j] < positive):
            break
        if places[j] == own and rank == 0:
            positive = scores[j]
            rank = j + 1
        elif places[j] != own and rank > 0:
            rank += 1
    if margin < 0:
        return rank, positive, np.float32(np.inf)
    if rank == 0:
        return rank, positive, positive
    return rank, positive, np.float32(positive - abs(positive) * margin)


@numba.njit(cache=True, nogil=True)
def find_exclusion(
    own: int, place: int, semi_positives: Ints, is_near: bool
) -> int:  # pragma: no cover (compiled)
    """Return why a place is no negative of the own place, or _KEPT."""
    if place == own:
        return _OWN
    if contains(semi_positives, place):
        return _SEMI_POSITIVE
    if is_near:
        return _NEAR
    return _KEPT


@numba.njit(cache=True, nogil=True)
def find_limit(
    score: np.float32, max_score: np.float32, margin_limit: np.float32, rank: int, range_min: int
) -> int:  # pragma: no cover (compiled)
    """Return the limit that a candidate of that rank from 1 on exceeds, or _KEPT."""
    if score > max_score:
        return _MAX_SCORE
    if score > margin_limit:
        return _RELATIVE_MARGIN
    if rank <= range_min:
        return _RANGE_MIN
    return _KEPT


@numba.njit(cache=True, nogil=True)
def insert_neighbor(
    places: Ints, scores: Floats32, count: int, place: int, score: float
) -> None:  # pragma: no cover (compiled)
    """Append a place that scores no higher than the `count` before it; order equals by place."""
    at = count
    while at > 0 and scores[at - 1] == score and places[at - 1] > place:
        places[at] = places[at - 1]
        scores[at] = scores[at - 1]
        at -= 1
    places[at] = place
    scores[at] = score


@numba.njit(cache=True, nogil=True)
def contains(ascending: Ints, value: int) -> bool:  # pragma: no cover (compiled)
    """Return whether a value is in an ascending array."""
    at = np.searchsorted(ascending, value)
    return bool(at < len(ascending) and ascending[at] == value)


@numba.njit(cache=True, nogil=True)
def new_set(size: int) -> tuple[Ints, Ints]:  # pragma: no cover (compiled)
    """Return `table` and `marks` of an empty hash set with room for `size` places."""
    slots = 16
    while slots < 2 * size:
        slots *= 2
    return np.zeros(slots, np.int64), np.zeros(slots, np.int64)


@numba.njit(cache=True, nogil=True)
def add_to_set(table: Ints, marks: Ints, mark: int, place: int) -> bool:  # pragma: no cover
    """Add a place to the set of `mark` and return whether it is new to the set.

    A set with a higher mark than all before it is empty: the table is reused without clearing.
    """
    mask = len(table) - 1
    # the high bits of the product: ids may differ only in their own high bits, where regions or
    # cells of a grid are often kept
    at = np.int64((np.uint64(place) * _HASH) >> np.uint64(32)) & mask
    while marks[at] == mark:
        if table[at] == place:
            return False
        at = (at + 1) & mask
    table[at] = place
    marks[at] = mark
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
    """Merge the rows order[starts[p]:starts[p + 1]] of neighbors[M, n] into merged[p] of [P, k].

    Pads are -1.
    """
    k = merged.shape[1]
    table, marks = new_set(k)
    mark = 0
    best = np.empty(k, np.int64)
    best_scores = np.empty(k, np.float32)
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
            merged[place, :count] = best[:count]
            merged_scores[place, :count] = best_scores[:count]


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
    """Merge two lists into best[k] and return the number of places in it; each counts once."""
    i = 0
    j = 0
    count = 0
    while count < len(best):
        has_a = i < len(a) and a[i] >= 0
        has_b = j < len(b) and b[j] >= 0
        if not has_a and not has_b:
            break
        if has_a and (
            not has_b or a_scores[i] > b_scores[j] or (a_scores[i] == b_scores[j] and a[i] <= b[j])
        ):
            place = a[i]
            score = a_scores[i]
            i += 1
        else:
            place = b[j]
            score = b_scores[j]
            j += 1
        if add_to_set(table, marks, mark, place):
            best[count] = place
            best_scores[count] = score
            count += 1
    return count


@numba.njit(cache=True, nogil=True)
def count_shared_rows(neighbors: Ints, previous: Ints) -> int:  # pragma: no cover (compiled)
    """Count the places of neighbors[P, k] that are in the same row of previous[P, n].

    Pads (-1) are not counted.
    """
    num_shared = 0
    for i in range(len(neighbors)):
        row = np.sort(previous[i])
        for place in neighbors[i]:
            num_shared += place >= 0 and contains(row, place)
    return num_shared
