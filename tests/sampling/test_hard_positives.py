"""Hard queries of a place in place of easy ones, against a loop over places."""

from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.arrays import Ints
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.query_scores import QueryScores
from s4g_ray.sampling.hard_positives import POSITIVE_STREAM, choose_hard_positives

NUM_PLACES = 40


def draw_pairs(seed: int) -> tuple[PairTable, QueryScores]:
    """Draw 1 to 6 queries of each place, in any order; queries of 32 places have scores."""
    rng = np.random.default_rng(seed)
    places = np.repeat(np.arange(NUM_PLACES), rng.integers(1, 7, NUM_PLACES))
    rng.shuffle(places)
    ids = np.sort(rng.choice(1000, len(places), replace=False))
    scored = np.flatnonzero(places < 32)
    # few values, so that some are equal
    scores = (rng.integers(0, 6, len(scored)) / 8).astype(np.float32)
    return PairTable(ids, ids + 5000, places), QueryScores(ids[scored], scores)


def oracle(pairs: PairTable, scores: QueryScores, share: float, seed: int, epoch: int) -> list[int]:
    """Swap the hardest for the easiest of each place, one after the other."""
    lots = np.random.default_rng((seed, epoch, POSITIVE_STREAM))
    known = dict(zip(scores.query_ids.tolist(), scores.scores.tolist(), strict=True))
    chosen = list(range(len(pairs)))
    for place in range(NUM_PLACES):
        rows = [
            row
            for row in range(len(pairs))
            if pairs.place_ids[row] == place and int(pairs.query_ids[row]) in known
        ]
        if not rows:
            continue
        rows.sort(key=lambda row: (known[int(pairs.query_ids[row])], row))
        num = int(share * len(rows) / 2 + lots.random())
        for rank in range(min(num, len(rows) // 2)):
            chosen[rows[len(rows) - 1 - rank]] = rows[rank]
    return chosen


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_that_of_a_loop_over_places(share: float, seed: int) -> None:
    pairs, scores = draw_pairs(seed)
    chosen = choose_hard_positives(pairs, scores, share=share, seed=seed, epoch=4)
    assert chosen.tolist() == oracle(pairs, scores, share, seed, 4)
    np.testing.assert_array_equal(pairs.place_ids[chosen], pairs.place_ids)
    assert (chosen == np.arange(len(pairs))).all() == (share == 0)


def test_a_share_of_the_slots_is_taken_on_average() -> None:
    """200 places of two queries: one slot of each may be taken, with a probability of the share."""
    places = np.repeat(np.arange(200), 2)
    pairs = PairTable(np.arange(400), np.arange(400), places)
    scores = QueryScores(np.arange(400), np.tile([0.9, 0.2], 200).astype(np.float32))

    def choose(epoch: int) -> Ints:
        return choose_hard_positives(pairs, scores, share=0.3, seed=1, epoch=epoch)

    taken = [choose(epoch) for epoch in range(20)]
    assert all((rows[1::2] == np.arange(1, 400, 2)).all() for rows in taken)
    share = np.mean([(rows[::2] % 2).mean() for rows in taken])
    assert share == pytest.approx(0.3, abs=0.03)
    assert not np.array_equal(taken[0], taken[1])
    np.testing.assert_array_equal(choose(0), taken[0])


def test_without_scores_each_pair_keeps_its_slot() -> None:
    pairs, _ = draw_pairs(0)
    chosen = choose_hard_positives(pairs, QueryScores.join([]), share=1.0, seed=0, epoch=0)
    np.testing.assert_array_equal(chosen, np.arange(len(pairs)))
