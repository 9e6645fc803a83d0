"""The planner's kernels: one greedy pass over the pairs, with O(1) state for each pair and place.

Pairs stand grouped by place (a position each), and a place gives its pairs in that order; so what is used
of a place is one number. A place that cannot join the batch when its turn comes waits in a queue, once
whatever the number of its pairs that wait.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64, Ints, Rows32, by_rows
from s4g_ray.sampling.exclusion_table import ExclusionTable

LOOKS_PER_SLOT = 4  # at places that wait, for each slot of a batch, before new pairs get their turn
LOOKS_PER_PAIR = (
    50  # at places that wait, in all, once every pair has had its turn: bounds hopeless searches
)
MAX_FAILURES = 100  # one after the other to fill a batch, each starting from another place
CHORDS_PER_CELL = (
    4  # of the grid over a batch: a search meets one to eight of its cells, two or three mostly
)
NEXT, END, CLOSED, DUE = (
    0,
    1,
    2,
    3,
)  # columns of the state of a place: 16 bytes, one cache line a look
READ, FIRST, WAITING = (
    0,
    1,
    2,
)  # how many turns are read; the ring's first entry and how many it holds
POSITION, PLACE = 0, 1  # columns of a batch's members
_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


class VisitOrder(NamedTuple):
    """The pairs in the order of their turns: places[N], positions[N]; pairs[position] is the pair that stands there."""

    places: Rows32
    positions: Rows32
    pairs: Rows32
    starts: Ints  # [P + 1]: the positions of each place

    @classmethod
    def draw(cls, place_of_pair: Rows32, num_places: int, rng: np.random.Generator) -> VisitOrder:
        """A random order of pairs whose places are place_of_pair[N]."""
        order = np.arange(len(place_of_pair), dtype=np.int32)
        rng.shuffle(order)
        counts = np.bincount(place_of_pair, minlength=num_places)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        places, positions, pairs = np.empty_like(order), np.empty_like(order), np.empty_like(order)
        _take_turns(order, place_of_pair, starts[:-1].copy(), places, positions, pairs)
        return cls(places, positions, pairs, starts)


class WaitingPlaces(NamedTuple):
    """Places that wait, each once, in a ring."""

    ring: Rows32  # [P]
    kept: Rows32  # [P] of those looked at, those that go on waiting
    cursor: Ints  # READ, FIRST, WAITING


def fill_batches(
    turns: VisitOrder,
    rows: Rows32,
    bars: ExclusionTable,
    *,
    batch_size: int,
    num_hard: int,
    pool_size: int,
    rng: np.random.Generator,
) -> NDArray[np.int32]:
    """Full batches [B, batch_size, 2], hard ones first: each pair's POSITION and PLACE.

    rows[P, K] are each place's neighbors; negative: a pad (-1), or a place that is planned elsewhere.
    """
    num_places = len(turns.starts) - 1
    state = np.zeros((num_places, 4), dtype=np.int32)
    state[:, NEXT], state[:, END], state[:, CLOSED] = turns.starts[:-1], turns.starts[1:], -1
    ring, kept = np.empty(num_places, dtype=np.int32), np.empty(num_places, dtype=np.int32)
    queue = WaitingPlaces(ring, kept, np.zeros(3, dtype=np.int64))
    grid = np.empty((1 << (2 * batch_size).bit_length()) + batch_size, dtype=np.int32)
    pool = np.empty(
        1 + min(pool_size, rows.shape[1]), dtype=np.int32
    )  # an anchor and its neighbors
    batches = np.empty((len(turns.places) // batch_size, batch_size, 2), dtype=np.int32)
    return batches[: _assemble(batches, turns, state, rows, pool, queue, bars, grid, num_hard, rng)]


def count_hard(places: Rows32, rows: Rows32, num_hard: int, *, threads: int | None = None) -> int:
    """How many of the num_hard nearest rows[P, K] of each place of each batch places[B, b] share its batch, in all.

    threads (None: one a CPU, four at most) take 4 P bytes each.
    """
    threads = threads or min(os.cpu_count() or 1, 4)
    return sum(
        by_rows(
            lambda first, last: int(_count_hard(first, last, places, rows, num_hard)),
            len(places),
            threads,
        )
    )


@numba.njit(cache=True, nogil=True)
def _count_hard(
    start: int, stop: int, places: Rows32, rows: Rows32, num_hard: int
) -> int:  # pragma: no cover (compiled)
    last_batch, total = (
        np.full(len(rows) + 1, -1, np.int32),
        0,
    )  # of place + 1; the first stands for all negative rows
    for batch in range(start, stop):
        for slot in range(places.shape[1]):
            last_batch[places[batch, slot] + 1] = batch
        for slot in range(places.shape[1]):
            for i in range(min(num_hard, rows.shape[1])):
                total += int(last_batch[max(rows[places[batch, slot], i], -1) + 1] == batch)
    return total


@numba.njit(cache=True, nogil=True)
def _take_turns(
    order: Rows32,
    place_of_pair: Rows32,
    free: Ints,
    places: Rows32,
    positions: Rows32,
    pairs: Rows32,
) -> None:  # pragma: no cover (compiled)
    for turn in range(len(order)):
        place = place_of_pair[order[turn]]
        places[turn], positions[turn] = place, free[place]
        pairs[free[place]] = order[turn]
        free[place] += 1


@numba.njit(cache=True, nogil=True)
def _assemble(
    batches: Rows32,
    turns: VisitOrder,
    state: Rows32,
    rows: Rows32,
    pool: Rows32,
    queue: WaitingPlaces,
    bars: ExclusionTable,
    grid: Rows32,
    num_hard: int,
    rng: np.random.Generator,
) -> int:  # pragma: no cover (compiled)
    """Fill batches as long as there are pairs for them; returns how many are full."""
    batch_size, num_turns, waiting = batches.shape[1], len(turns.places), 0
    batch, attempt, failures, looks = 0, 0, 0, LOOKS_PER_PAIR * num_turns
    while batch < len(batches):
        all_read = queue.cursor[READ] == num_turns
        size, looked = _fill_batch(
            batches[batch], attempt, turns, state, rows, pool, queue, bars, grid, num_hard, rng
        )
        attempt += 1
        looks -= looked if all_read else 0
        if size == batch_size:
            batch, failures = batch + 1, 0
            continue
        # nothing is left that may join. Without its first place, which may bar the others, they may still fill it
        _empty_batch(batches[batch, :size], state, queue)
        failures, waiting, looks = failures + 1, queue.cursor[WAITING], looks - size * num_hard
        if waiting < batch_size or failures > min(waiting, MAX_FAILURES) or looks < 0:
            break
    return batch


@numba.njit(cache=True, nogil=True)
def _fill_batch(
    members: Rows32,
    attempt: int,
    turns: VisitOrder,
    state: Rows32,
    rows: Rows32,
    pool: Rows32,
    queue: WaitingPlaces,
    bars: ExclusionTable,
    grid: Rows32,
    num_hard: int,
    rng: np.random.Generator,
) -> tuple[int, int]:  # pragma: no cover (compiled)
    """Fill a batch from places that wait, then by turns; returns how many joined, how many that wait were looked at.

    Arrays are taken out of tuples here, once a batch: each time counts references, atomically.
    """
    turn_places, turn_positions, cursor, waiting = (
        turns.places,
        turns.positions,
        queue.cursor,
        queue.cursor[WAITING],
    )
    size, looked, kept, read = 0, 0, 0, cursor[READ]
    may_look = min(waiting, LOOKS_PER_SLOT * len(members))
    starts, named, xyz, chord = bars.starts, bars.members, bars.xyz, bars.chord
    barring = len(starts) + len(xyz) > 0
    grid[:] = -1
    while size < len(members):
        if looked < may_look:
            looked += 1
            place = _pop(queue)
            if state[place, NEXT] < state[place, DUE]:
                size = _add_anchor(
                    place,
                    size,
                    attempt,
                    members,
                    state,
                    rows,
                    pool,
                    barring,
                    starts,
                    named,
                    xyz,
                    chord,
                    grid,
                    num_hard,
                    rng,
                )
            if state[place, NEXT] < state[place, DUE]:
                queue.kept[kept] = place
                kept += 1
            else:
                state[place, DUE] = 0
        elif read < len(turn_places):
            place, position = turn_places[read], turn_positions[read]
            read += 1
            if position < state[place, NEXT]:  # it joined as a neighbor
                continue
            size = _add_anchor(
                place,
                size,
                attempt,
                members,
                state,
                rows,
                pool,
                barring,
                starts,
                named,
                xyz,
                chord,
                grid,
                num_hard,
                rng,
            )
            if position >= state[place, NEXT]:
                if state[place, DUE] == 0:
                    _push(queue, place)
                state[place, DUE] = position + 1
        elif may_look < waiting:
            may_look = waiting
        else:
            break
    cursor[READ] = read
    for i in range(kept):  # back to the front, in their order
        _push_front(queue, queue.kept[kept - 1 - i])
    return size, looked


@numba.njit(cache=True, nogil=True)
def _empty_batch(
    members: Rows32, state: Rows32, queue: WaitingPlaces
) -> None:  # pragma: no cover (compiled)
    """Take back a batch that could not be filled after all turns: its places wait again, the first one behind all."""
    for place in members[:, PLACE]:
        state[place, NEXT] -= 1
        if state[place, DUE] == 0:
            _push(queue, place)
        state[place, DUE] = state[place, END]
    first = members[0, PLACE]
    for _ in range(queue.cursor[WAITING]):
        place = _pop(queue)
        if place != first:
            _push(queue, place)
    _push(queue, first)


@numba.njit(cache=True, nogil=True)
def _pop(queue: WaitingPlaces) -> int:  # pragma: no cover (compiled)
    place: int = queue.ring[queue.cursor[FIRST]]
    queue.cursor[FIRST] = (queue.cursor[FIRST] + 1) % len(queue.ring)
    queue.cursor[WAITING] -= 1
    return place


@numba.njit(cache=True, nogil=True)
def _push(queue: WaitingPlaces, place: int) -> None:  # pragma: no cover (compiled)
    queue.ring[(queue.cursor[FIRST] + queue.cursor[WAITING]) % len(queue.ring)] = place
    queue.cursor[WAITING] += 1


@numba.njit(cache=True, nogil=True)
def _push_front(queue: WaitingPlaces, place: int) -> None:  # pragma: no cover (compiled)
    queue.cursor[FIRST] = (queue.cursor[FIRST] - 1) % len(queue.ring)
    queue.ring[queue.cursor[FIRST]] = place
    queue.cursor[WAITING] += 1


@numba.njit(cache=True, nogil=True)
def _add_anchor(
    anchor: int,
    size: int,
    attempt: int,
    members: Rows32,
    state: Rows32,
    rows: Rows32,
    pool: Rows32,
    barring: bool,
    starts: Ints,
    named: Rows32,
    xyz: Floats64,
    chord: float,
    grid: Rows32,
    num_hard: int,
    rng: np.random.Generator,
) -> int:  # pragma: no cover (compiled)
    """Add a place and its neighbors: the nearest half always, the other half drawn from the rest of the pool.

    Who has no pair left or is closed to the batch is passed over here, before any call with arrays: that costs more.
    """
    if state[anchor, CLOSED] == attempt:
        return size
    pool[0], count = anchor, 1
    while count < len(pool) and rows[anchor, count - 1] != -1:
        pool[count] = rows[anchor, count - 1]
        count += 1
    nearest = min(num_hard // 2, count - 1)
    chosen = 1 + nearest + min(num_hard - num_hard // 2, count - 1 - nearest)
    for i in range(chosen):
        if size == len(members):
            break
        if i > nearest:
            other = rng.integers(i, count)
            pool[i], pool[other] = pool[other], pool[i]
        place = pool[i]
        if place < 0 or state[place, NEXT] == state[place, END] or state[place, CLOSED] == attempt:
            continue
        state[place, CLOSED] = attempt
        if not barring or _may_join(
            place, size, attempt, members, state, starts, named, xyz, chord, grid
        ):
            members[size, POSITION], members[size, PLACE] = state[place, NEXT], place
            state[place, NEXT] += 1
            size += 1
        elif i == 0:
            break
    return size


@numba.njit(cache=True, nogil=True)
def _may_join(
    place: int,
    size: int,
    attempt: int,
    members: Rows32,
    state: Rows32,
    starts: Ints,
    named: Rows32,
    xyz: Floats64,
    chord: float,
    grid: Rows32,
) -> bool:  # pragma: no cover (compiled)
    """Whether nothing in the batch is too near; if so, the places that this one bars are closed to the batch."""
    if len(xyz) and _has_near_member(place, size, members, xyz, chord, grid):
        return False
    if len(starts):
        for i in range(starts[place], starts[place + 1]):
            state[named[i], CLOSED] = attempt
    return True


@numba.njit(cache=True, nogil=True)
def _has_near_member(
    place: int, size: int, members: Rows32, xyz: Floats64, chord: float, grid: Rows32
) -> bool:  # pragma: no cover (compiled)
    """Whether a place is within the chord of one of the batch; if not, it is put into the grid as slot `size`.

    The grid holds the slot that was last put into each bucket of cells, then for each slot the one before it
    in its bucket; -1 for none.
    """
    x, y, z, cell = xyz[place, 0], xyz[place, 1], xyz[place, 2], CHORDS_PER_CELL * chord
    num_buckets = len(grid) - len(members)
    if np.isnan(x):  # near none
        return False
    for i in range(_cell(x - chord, cell), _cell(x + chord, cell) + 1):
        for j in range(_cell(y - chord, cell), _cell(y + chord, cell) + 1):
            for k in range(_cell(z - chord, cell), _cell(z + chord, cell) + 1):
                slot = grid[_bucket(i, j, k, num_buckets)]
                while slot >= 0:
                    other = members[slot, PLACE]
                    if (xyz[other, 0] - x) ** 2 + (xyz[other, 1] - y) ** 2 + (
                        xyz[other, 2] - z
                    ) ** 2 <= chord**2:
                        return True
                    slot = grid[num_buckets + slot]
    bucket = _bucket(_cell(x, cell), _cell(y, cell), _cell(z, cell), num_buckets)
    grid[num_buckets + size], grid[bucket] = grid[bucket], size
    return False


@numba.njit(cache=True, nogil=True)
def _cell(coordinate: float, size: float) -> int:  # pragma: no cover (compiled)
    return int(np.floor(coordinate / size))


@numba.njit(cache=True, nogil=True)
def _bucket(i: int, j: int, k: int, num_buckets: int) -> int:  # pragma: no cover (compiled)
    """A bucket of a cell; num_buckets is a power of two."""
    mixed = ((np.uint64(i) * _HASH + np.uint64(j)) * _HASH + np.uint64(k)) * _HASH
    bucket: int = np.int64(mixed >> np.uint64(32)) & (num_buckets - 1)  # type: ignore[assignment]
    return bucket
