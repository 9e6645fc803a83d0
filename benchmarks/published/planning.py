"""Fill batches as published, on Python lists: a baseline, not to be used in training.

Written anew from its description. Reads a shuffled list of pairs from its front with pop(0). A pair
joins the batch, is rejected if it is used already, or returns to the end of the list when its place
is in the batch already. Its neighbors follow it: the nearest half, and as many drawn from the rest
of a deep copy of all neighbor lists. Stops after 1,024 rejected pairs in a row; drops the last,
incomplete batch.
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
    """Fill batches of pairs, no place twice in a batch."""
    rng = random.Random(seed)
    waiting = copy.deepcopy(pairs)
    pools = copy.deepcopy(neighbors)
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
            rejects += 1
            continue
        if pair[0] in in_batch:
            waiting.append(pair)
            rejects += 1
            continue
        rejects = 0
        pool = pools[pair[0]][:pool_size]
        nearest = pool[: num_hard // 2]
        rest = pool[num_hard // 2 :]
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
            batch = []
            in_batch = set()
    return batches
