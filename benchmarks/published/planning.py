"""The published way to fill batches, on Python lists, written anew from its description: a baseline, not to be used.

A shuffled list of pairs is read from its front with pop(0). A pair opens its batch or is put back to the end
when its place is in the batch already; its neighbors follow: the nearest half, and as many drawn from the rest
of a deep copy of all neighbor lists. It gives up after 1,024 rejects in a row; the last batch is dropped.
"""

from __future__ import annotations

import copy
import random

MAX_REJECTS = 1024
Pair = tuple[int, int]  # place, number


def plan_with_lists(
    pairs: list[Pair],
    neighbors: dict[int, list[int]],
    *,
    batch_size: int,
    num_hard: int,
    pool_size: int,
    seed: int,
) -> list[list[Pair]]:
    """Batches of pairs, each of another place."""
    rng = random.Random(seed)
    waiting, pools = copy.deepcopy(pairs), copy.deepcopy(neighbors)
    rng.shuffle(waiting)
    pairs_of_place: dict[int, list[Pair]] = {}
    for pair in waiting:
        pairs_of_place.setdefault(pair[0], []).append(pair)
    used: set[Pair] = set()
    batches: list[list[Pair]] = []
    batch: list[Pair] = []
    in_batch: set[int] = set()
    rejects = 0
    while waiting and rejects < MAX_REJECTS:
        pair = waiting.pop(0)
        if pair in used:
            continue
        if pair[0] in in_batch:
            waiting.append(pair)
            rejects += 1
            continue
        rejects = 0
        pool = pools[pair[0]][:pool_size]
        nearest, rest = pool[: num_hard // 2], pool[num_hard // 2 :]
        rng.shuffle(rest)
        chosen = [pair]
        for place in nearest + rest[: num_hard - num_hard // 2]:
            chosen += [other for other in pairs_of_place.get(place, []) if other not in used][:1]
        for joining in chosen:
            if joining[0] not in in_batch and len(batch) < batch_size:
                batch.append(joining)
                in_batch.add(joining[0])
                used.add(joining)
        if len(batch) == batch_size:
            batches.append(batch)
            batch, in_batch = [], set()
    return batches
