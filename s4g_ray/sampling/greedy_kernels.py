"""Fill batches in one compiled greedy pass over the pairs, with O(1) state for each pair and place.

Pairs are grouped by place and a place gives its pairs in the order of their positions
(VisitOrder), so that one number holds which pairs of a place are used. A place that cannot join
the batch in its turn waits in a queue, once for all of its waiting pairs.

Names and shapes, for N pairs of P places and batches of b pairs:

rows[P, K]       neighbors of each place as rows of places, nearest first. Negative: a pad (-1), or
                 a place that is planned elsewhere
state[P, 4]      int32, 16 bytes a place: each access reads one cache line. Columns:
                 NEXT    the position of the first unused pair
                 END     the end of the place's positions
                 CLOSED  the last attempt that the place cannot join any more: it is a member
                         already, or excluded by a member
                 DUE     1 + the last position that has had its turn while the place waits;
                         0 when the place is not in the queue
members[b, 2]    the batch: POSITION and PLACE of each pair; the first `size` are filled
attempt          a number for each attempt to fill a batch
pool             [1 + K] int32: an anchor and its neighbors
starts, partners, xyz, chord
                 the fields of ExclusionTable
grid             int32: the members in cells of space, see _has_near_member
queue            WaitingPlaces
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64, Ints, Rows32
from s4g_ray.sampling.exclusion_table import ExclusionTable
from s4g_ray.sampling.visit_order import FIRST, READ, WAITING, VisitOrder, WaitingPlaces

# waiting places that are tried for each slot of a batch, before new pairs get their turn
TRIES_PER_SLOT = 4
# waiting places that are tried in all, for each pair, once every pair has had its turn: bounds
# hopeless searches
TRIES_PER_PAIR = 50
MAX_FAILURES = 100  # failures in a row to fill a batch, each starting from another place
# cells of the grid over a batch: a search meets one to eight of them, usually two or three
CHORDS_PER_CELL = 4
# columns of `state`
NEXT = 0
END = 1
CLOSED = 2
DUE = 3
# columns of a batch's members
POSITION = 0
PLACE = 1
_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def fill_batches(
    order: VisitOrder,
    rows: Rows32,
    exclusions: ExclusionTable,
    *,
    batch_size: int,
    num_hard: int,
    pool_size: int,
    rng: np.random.Generator,
) -> NDArray[np.int32]:
    """Arrange pairs into full batches [B, batch_size, 2], hard ones first: POSITION and PLACE.

    rows[P, K] are the neighbors of each place; negative: a pad (-1), or a place that is planned
    elsewhere.
    """
    num_places = len(order.starts) - 1
    state = np.zeros((num_places, 4), dtype=np.int32)
    state[:, NEXT] = order.starts[:-1]
    state[:, END] = order.starts[1:]
    state[:, CLOSED] = -1
    queue = WaitingPlaces.allocate(num_places)
    grid = np.empty((1 << (2 * batch_size).bit_length()) + batch_size, dtype=np.int32)
    pool = np.empty(1 + min(pool_size, rows.shape[1]), dtype=np.int32)
    batches = np.empty((len(order.places) // batch_size, batch_size, 2), dtype=np.int32)
    num_full = _fill_batches(
        batches, order, state, rows, pool, queue, exclusions, grid, num_hard, rng
    )
    return batches[:num_full]


@numba.njit(cache=True, nogil=True)
def _fill_batches(
    batches: Rows32,
    order: VisitOrder,
    state: Rows32,
    rows: Rows32,
    pool: Rows32,
    queue: WaitingPlaces,
    exclusions: ExclusionTable,
    grid: Rows32,
    num_hard: int,
    rng: np.random.Generator,
) -> int:  # pragma: no cover (compiled)
    """Fill batches as long as there are pairs for them; return the number of full batches."""
    batch_size = batches.shape[1]
    num_turns = len(order.places)
    batch = 0
    attempt = 0
    failures = 0
    tries_left = TRIES_PER_PAIR * num_turns
    while batch < len(batches):
        grid[:] = -1
        is_all_read = queue.cursor[READ] == num_turns
        size, num_tried = _fill_batch(
            batches[batch],
            attempt,
            order,
            state,
            rows,
            pool,
            queue,
            exclusions,
            grid,
            num_hard,
            rng,
        )
        attempt += 1
        if is_all_read:
            tries_left -= num_tried
        if size == batch_size:
            batch += 1
            failures = 0
            continue
        # No place is left that may join. The first member may exclude the others: without it they
        # may still fill the batch.
        _empty_batch(batches[batch, :size], state, queue)
        failures += 1
        num_waiting = queue.cursor[WAITING]
        tries_left -= size * num_hard
        if num_waiting < batch_size or failures > min(num_waiting, MAX_FAILURES) or tries_left < 0:
            break
    return batch


@numba.njit(cache=True, nogil=True)
def _fill_batch(
    members: Rows32,
    attempt: int,
    order: VisitOrder,
    state: Rows32,
    rows: Rows32,
    pool: Rows32,
    queue: WaitingPlaces,
    exclusions: ExclusionTable,
    grid: Rows32,
    num_hard: int,
    rng: np.random.Generator,
) -> tuple[int, int]:  # pragma: no cover (compiled)
    """Fill a batch from waiting places, then by turns; return its size and the waiting ones tried.

    Arrays are taken out of tuples here, once a batch: each access counts references, atomically.
    """
    turn_places = order.places
    turn_positions = order.positions
    starts, partners, xyz, chord = exclusions
    num_waiting = queue.cursor[WAITING]
    tries_first = min(num_waiting, TRIES_PER_SLOT * len(members))
    read = queue.cursor[READ]
    size = 0
    num_tried = 0
    num_kept = 0
    while size < len(members) and (read < len(turn_places) or num_tried < num_waiting):
        is_waiting = num_tried < tries_first or read == len(turn_places)
        if is_waiting:
            num_tried += 1
            place = _pop(queue)
            position = state[place, DUE] - 1
        else:
            place = turn_places[read]
            position = turn_positions[read]
            read += 1
        if position < state[place, NEXT]:  # the pair has joined as a neighbor
            if is_waiting:
                state[place, DUE] = 0
            continue
        size = _add_anchor(
            place,
            size,
            attempt,
            members,
            state,
            rows,
            pool,
            starts,
            partners,
            xyz,
            chord,
            grid,
            num_hard,
            rng,
        )
        num_kept = _end_turn(place, position, is_waiting, num_kept, state, queue)
    queue.cursor[READ] = read
    _return_kept(queue, num_kept)
    return size, num_tried


@numba.njit(cache=True, nogil=True)
def _end_turn(
    place: int, position: int, is_waiting: bool, num_kept: int, state: Rows32, queue: WaitingPlaces
) -> int:  # pragma: no cover (compiled)
    """Let a place wait if its pair has not joined; return the number of places in queue.kept."""
    has_joined = position < state[place, NEXT]
    if is_waiting and has_joined:
        state[place, DUE] = 0
    elif is_waiting:
        queue.kept[num_kept] = place
        num_kept += 1
    elif not has_joined:
        if state[place, DUE] == 0:
            _push(queue, place)
        state[place, DUE] = position + 1
    return num_kept


@numba.njit(cache=True, nogil=True)
def _return_kept(queue: WaitingPlaces, num_kept: int) -> None:  # pragma: no cover (compiled)
    """Put the places that are still waiting back to the front of the queue, in their order."""
    for i in range(num_kept):
        _push_front(queue, queue.kept[num_kept - 1 - i])


@numba.njit(cache=True, nogil=True)
def _empty_batch(
    members: Rows32, state: Rows32, queue: WaitingPlaces
) -> None:  # pragma: no cover (compiled)
    """Undo a batch that could not be filled after all turns: its places wait again.

    The first place waits behind all others.
    """
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
    starts: Ints,
    partners: Rows32,
    xyz: Floats64,
    chord: float,
    grid: Rows32,
    num_hard: int,
    rng: np.random.Generator,
) -> int:  # pragma: no cover (compiled)
    """Add a place and its neighbors, and return the new size of the batch.

    The nearest num_hard / 2 neighbors come first, the other half is drawn from the rest of the
    pool. A place that has no pair left or is closed to the batch is skipped here, before any call
    with arrays, because such a call costs more.
    """
    if state[anchor, CLOSED] == attempt:
        return size
    has_exclusions = len(starts) + len(xyz) > 0
    pool[0] = anchor
    count = 1
    while count < len(pool) and rows[anchor, count - 1] != -1:
        pool[count] = rows[anchor, count - 1]
        count += 1
    num_nearest = min(num_hard // 2, count - 1)
    num_chosen = 1 + num_nearest + min(num_hard - num_hard // 2, count - 1 - num_nearest)
    for i in range(num_chosen):
        if size == len(members):
            break
        if i > num_nearest:
            other = rng.integers(i, count)
            pool[i], pool[other] = pool[other], pool[i]
        place = pool[i]
        if place < 0 or state[place, NEXT] == state[place, END] or state[place, CLOSED] == attempt:
            continue
        state[place, CLOSED] = attempt
        if not has_exclusions or _may_join(
            place, size, attempt, members, state, starts, partners, xyz, chord, grid
        ):
            members[size, POSITION] = state[place, NEXT]
            members[size, PLACE] = place
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
    partners: Rows32,
    xyz: Floats64,
    chord: float,
    grid: Rows32,
) -> bool:  # pragma: no cover (compiled)
    """Return whether no member is too near; if so, close the batch to the place's partners."""
    if len(xyz) and _has_near_member(place, size, members, xyz, chord, grid):
        return False
    if len(starts):
        for i in range(starts[place], starts[place + 1]):
            state[partners[i], CLOSED] = attempt
    return True


@numba.njit(cache=True, nogil=True)
def _has_near_member(
    place: int, size: int, members: Rows32, xyz: Floats64, chord: float, grid: Rows32
) -> bool:  # pragma: no cover (compiled)
    """Return whether a member is within the chord of a place; if not, put it into the grid.

    The place enters the grid as slot `size`. The grid holds the last slot of each bucket of cells,
    then for each slot the one before it in its bucket; -1 for none.
    """
    x = xyz[place, 0]
    y = xyz[place, 1]
    z = xyz[place, 2]
    cell = CHORDS_PER_CELL * chord
    num_buckets = len(grid) - len(members)
    if np.isnan(x):  # near none
        return False
    for i in range(_find_cell(x - chord, cell), _find_cell(x + chord, cell) + 1):
        for j in range(_find_cell(y - chord, cell), _find_cell(y + chord, cell) + 1):
            for k in range(_find_cell(z - chord, cell), _find_cell(z + chord, cell) + 1):
                slot = grid[_find_bucket(i, j, k, num_buckets)]
                while slot >= 0:
                    other = members[slot, PLACE]
                    if (xyz[other, 0] - x) ** 2 + (xyz[other, 1] - y) ** 2 + (
                        xyz[other, 2] - z
                    ) ** 2 <= chord**2:
                        return True
                    slot = grid[num_buckets + slot]
    bucket = _find_bucket(
        _find_cell(x, cell), _find_cell(y, cell), _find_cell(z, cell), num_buckets
    )
    grid[num_buckets + size] = grid[bucket]
    grid[bucket] = size
    return False


@numba.njit(cache=True, nogil=True)
def _find_cell(coordinate: float, size: float) -> int:  # pragma: no cover (compiled)
    return int(np.floor(coordinate / size))


@numba.njit(cache=True, nogil=True)
def _find_bucket(i: int, j: int, k: int, num_buckets: int) -> int:  # pragma: no cover (compiled)
    """Return the bucket of a cell; num_buckets is a power of two."""
    mixed = ((np.uint64(i) * _HASH + np.uint64(j)) * _HASH + np.uint64(k)) * _HASH
    bucket: int = np.int64(mixed >> np.uint64(32)) & (num_buckets - 1)  # type: ignore[assignment]
    return bucket
