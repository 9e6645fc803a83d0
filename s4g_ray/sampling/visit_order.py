"""The order in which the planner visits pairs: VisitOrder (random) and WaitingPlaces (a queue)."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from s4g_ray.arrays import Ints, Rows32

# entries of WaitingPlaces.cursor
READ = 0
FIRST = 1
WAITING = 2


class VisitOrder(NamedTuple):
    """The turns of N pairs of P places.

    In turn t comes the pair pairs[positions[t]], of place places[t]. Positions number the pairs
    grouped by place, in the order of their turns, so that a place uses its positions in ascending
    order.
    """

    places: Rows32  # [N]
    positions: Rows32  # [N]
    pairs: Rows32  # [N]: the pair at each position
    starts: Ints  # [P + 1]: place p has the positions starts[p]..starts[p + 1] - 1

    @classmethod
    def draw(cls, place_of_pair: Rows32, num_places: int, rng: np.random.Generator) -> VisitOrder:
        """Draw a random order of pairs whose places are place_of_pair[N]."""
        order = np.arange(len(place_of_pair), dtype=np.int32)
        rng.shuffle(order)
        counts = np.bincount(place_of_pair, minlength=num_places)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        places = np.empty_like(order)
        positions = np.empty_like(order)
        pairs = np.empty_like(order)
        _assign_positions(order, place_of_pair, starts[:-1].copy(), places, positions, pairs)
        return cls(places, positions, pairs, starts)


class WaitingPlaces(NamedTuple):
    """A queue of waiting places, each once, in a ring; and the number of turns that are read."""

    ring: Rows32  # [P]
    kept: Rows32  # [P]: places tried for the present batch that still wait
    cursor: Ints  # [3]: READ turns; the FIRST entry of the ring; the number WAITING in it

    @classmethod
    def allocate(cls, num_places: int) -> WaitingPlaces:
        """Return an empty queue with room for all places."""
        return cls(
            ring=np.empty(num_places, dtype=np.int32),
            kept=np.empty(num_places, dtype=np.int32),
            cursor=np.zeros(3, dtype=np.int64),
        )


@numba.njit(cache=True, nogil=True)
def _assign_positions(
    order: Rows32,
    place_of_pair: Rows32,
    free: Ints,
    places: Rows32,
    positions: Rows32,
    pairs: Rows32,
) -> None:  # pragma: no cover (compiled)
    """Give each pair of order[N] the next free position of its place; free[P] is used up."""
    for turn in range(len(order)):
        place = place_of_pair[order[turn]]
        places[turn] = place
        positions[turn] = free[place]
        pairs[free[place]] = order[turn]
        free[place] += 1
