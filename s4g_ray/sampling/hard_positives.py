"""Prefer the hardest queries of a place in an epoch's batches.

Hard is a query that scores low against its own place in the last mining round. An epoch keeps its
length and its places: a hard pair comes once more in place of an easy one of the same place.
"""

from __future__ import annotations

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.query_scores import QueryScores
from s4g_ray.row_lookup import rows_of

POSITIVE_STREAM = 0x706F73  # of the draws of this module, beside others of (seed, epoch)


def choose_hard_positives(
    pairs: PairTable, scores: QueryScores, *, share: float, seed: int, epoch: int
) -> Ints:
    """Return for each of N pairs the row of the pair that takes its slot: itself, or a harder one.

    Of the c pairs of a place whose queries have scores, the share * c / 2 hardest take the slots of
    as many easiest too; a fraction is rounded up or down at random, so that its mean is kept. With
    share 1, the harder half comes twice and the easier half not at all. Equal scores are in the
    order of the pairs. A function of its arguments.
    """
    chosen = np.arange(len(pairs))
    found = rows_of(scores.query_ids, pairs.query_ids)
    ranked = np.flatnonzero(found >= 0)
    if not len(ranked):
        return chosen
    order = np.lexsort((scores.scores[found[ranked]], pairs.place_ids[ranked]))
    ranked = ranked[order]  # by place, hardest first
    places, starts, counts = np.unique(
        pairs.place_ids[ranked], return_index=True, return_counts=True
    )
    lots = np.random.default_rng((seed, epoch, POSITIVE_STREAM)).random(len(places))
    num_repeated = np.minimum(np.floor(share * counts / 2 + lots).astype(np.int64), counts // 2)
    place = np.repeat(np.arange(len(places)), num_repeated)
    first = np.cumsum(num_repeated) - num_repeated
    rank = np.arange(len(place)) - first[place]  # 0: the hardest, and the easiest
    easiest = starts[place] + counts[place] - 1 - rank
    chosen[ranked[easiest]] = ranked[starts[place] + rank]
    return chosen
