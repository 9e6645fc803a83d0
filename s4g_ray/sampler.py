"""Batch plans: which training pairs meet in which global batch.

Sample4Geo's rule (arXiv 2303.11851, section 3.3): a batch starts from a random unused pair and its neighbors
join: half of `num_hard_negatives` are the nearest of the pool, half are drawn at random from the rest of it.
A plan depends on the pairs, the graph, the seed and the epoch, and not on the number of workers.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray import storage
from s4g_ray.neighbors import NeighborGraph

Ints = NDArray[np.int64]
RETRIES_PER_PAIR = 50  # of pairs looked at again in batches that could not be filled
_PLAN_STREAM = 0x706C616E  # keeps the planner's random stream apart from others of the same (seed, epoch)


@dataclass(frozen=True)
class PairTable:
    """Training pairs, one a row: query_ids[N], reference_ids[N], place_ids[N], int64."""

    query_ids: Ints
    reference_ids: Ints
    place_ids: Ints

    def __post_init__(self) -> None:
        if not len(self.query_ids) == len(self.reference_ids) == len(self.place_ids):
            raise ValueError("query_ids, reference_ids and place_ids differ in length")

    def __len__(self) -> int:
        return len(self.query_ids)


@dataclass(frozen=True)
class PlanStats:
    """What became of the pairs. num_planned + num_left_out == num_pairs."""

    num_pairs: int
    num_planned: int
    num_left_out: int  # did not fit a full batch; the next epoch starts from another order
    hardness: float  # mean over planned pairs: how many of its num_hard_negatives nearest places share its batch


@dataclass(frozen=True)
class BatchPlan:
    """batches[B, batch_size]: rows of the pair table. Rank r of W takes slots r*b .. (r+1)*b - 1."""

    batches: Ints
    stats: PlanStats

    def save(self, uri: str, pairs: PairTable, **metadata: Any) -> None:
        """Write as Parquet (batch, slot, query_id, reference_id); stats go into the file's metadata."""
        num_batches, batch_size = self.batches.shape
        rows = self.batches.ravel()
        batch, slot = np.divmod(np.arange(rows.size, dtype=np.int32), np.int32(batch_size))
        table = pa.table(
            {
                "batch": pa.array(batch, pa.int32()),
                "slot": pa.array(slot, pa.int32()),
                "query_id": pairs.query_ids[rows],
                "reference_id": pairs.reference_ids[rows],
            }
        )
        stats = {**asdict(self.stats), **metadata, "num_batches": num_batches, "batch_size": batch_size}
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({f"s4g.{k}": str(v) for k, v in stats.items()}), buffer)
        storage.write_bytes(uri, buffer.getvalue())


def load_plan(uri: str) -> tuple[Ints, Ints]:
    """query_ids[B, batch_size] and reference_ids[B, batch_size] of a saved plan."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    batch_size = int(table.schema.metadata[b"s4g.batch_size"])
    queries, references = table["query_id"].to_numpy(), table["reference_id"].to_numpy()
    return queries.reshape(-1, batch_size), references.reshape(-1, batch_size)


def plan_batches(
    pairs: PairTable,
    graph: NeighborGraph | None,
    *,
    batch_size: int,
    num_hard_negatives: int = 64,
    neighbor_pool_size: int = 128,
    seed: int,
    epoch: int,
    protocol: Literal["strict", "paper"] = "strict",
    exclusions: NeighborGraph | None = None,
) -> BatchPlan:
    """Arrange pairs into full batches of `batch_size`; without a graph, at random.

    Each pair stands in at most one batch, no place twice in a batch, and no two places that `exclusions`
    holds in either direction. What does not fill a batch is left out and counted. `strict` shuffles the
    order of the batches (as built they go from hard to easy); `paper` keeps it. Raises ValueError for
    impossible sizes. Source: arXiv 2303.11851, section 3.3.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size={batch_size} is below 2: a batch needs a negative")
    if not 0 <= num_hard_negatives <= neighbor_pool_size:
        raise ValueError(f"{num_hard_negatives=} exceeds {neighbor_pool_size=}; lower the first or raise the second")
    rng = np.random.default_rng((seed, epoch, _PLAN_STREAM))
    places, place_of_pair = np.unique(pairs.place_ids, return_inverse=True)
    neighbors = _rows_by_place(graph, places, neighbor_pool_size)
    blocked = _symmetric_rows(exclusions, places)
    order = rng.permutation(len(pairs)).astype(np.int64)
    pairs_by_place = order[np.argsort(place_of_pair[order], kind="stable")]
    starts = np.searchsorted(place_of_pair[pairs_by_place], np.arange(len(places) + 1))
    batches = _assemble(
        order, place_of_pair.astype(np.int64), pairs_by_place, starts.astype(np.int64), neighbors, *blocked,
        batch_size, num_hard_negatives, rng,
    )  # fmt: skip
    if protocol == "strict":
        batches = rng.permutation(batches)
    hardness = _hardness(place_of_pair[batches].astype(np.int64), neighbors[:, :num_hard_negatives])
    stats = PlanStats(len(pairs), batches.size, len(pairs) - batches.size, float(hardness))
    return BatchPlan(batches, stats)


def _rows_by_place(graph: NeighborGraph | None, places: Ints, width: int) -> Ints:
    """The graph as rows of `places`, [P, K], K <= width: unknown places are dropped, -1 pads."""
    if graph is None:
        return np.full((len(places), 0), -1, dtype=np.int64)
    found = _positions(places, graph.neighbors)
    rows = _positions(places, graph.place_ids)
    packed = np.full_like(found, -1)
    kept = found >= 0
    row, _ = np.nonzero(kept)
    packed[row, (np.cumsum(kept, axis=1) - 1)[kept]] = found[kept]
    result = np.full((len(places), min(width, found.shape[1])), -1, dtype=np.int64)
    result[rows[rows >= 0]] = packed[rows >= 0, : result.shape[1]]
    return result


def _positions(places: Ints, ids: Ints) -> Ints:
    """Positions of ids in the sorted `places`, -1 for those that are not there."""
    at = np.minimum(np.searchsorted(places, ids), max(len(places) - 1, 0))
    return np.where(places[at] == ids, at, -1) if len(places) else np.full(ids.shape, -1)


def _symmetric_rows(exclusions: NeighborGraph | None, places: Ints) -> tuple[Ints, Ints]:
    """Exclusions in both directions, as CSR over rows of `places`: starts[P + 1], members[E]."""
    if exclusions is None:
        return np.zeros(len(places) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    source = _positions(places, np.repeat(exclusions.place_ids, exclusions.neighbors.shape[1]))
    target = _positions(places, exclusions.neighbors.ravel())
    known = (source >= 0) & (target >= 0)
    both = np.concatenate([source[known], target[known]]), np.concatenate([target[known], source[known]])
    order = np.argsort(both[0], kind="stable")
    return np.searchsorted(both[0][order], np.arange(len(places) + 1)).astype(np.int64), both[1][order]


@numba.njit(cache=True)
def _place_is_free(place: int, attempt: int, in_batch: Ints, barred: Ints) -> bool:  # pragma: no cover (compiled)
    return bool(in_batch[place] != attempt and barred[place] != attempt)


@numba.njit(cache=True)
def _assemble(
    order: Ints,
    place_of_pair: Ints,
    pairs_by_place: Ints,
    starts: Ints,
    neighbors: Ints,
    barred_starts: Ints,
    barred_members: Ints,
    batch_size: int,
    num_hard: int,
    rng: np.random.Generator,
) -> Ints:  # pragma: no cover (compiled)
    """One greedy pass with O(1) state for each pair and place.

    A pair whose place cannot join the current batch waits in `deferred` and is tried first in the next one.
    """
    num_pairs, num_places = len(order), len(starts) - 1
    batches = np.empty((num_pairs // batch_size, batch_size), np.int64)
    used = np.zeros(num_pairs, np.bool_)
    next_of_place = starts[:-1].copy()
    in_batch = np.full(num_places, -1, np.int64)  # the last attempt at a batch that holds the place
    barred = np.full(num_places, -1, np.int64)  # the last attempt that an exclusion bars it from
    deferred = np.empty(num_pairs, np.int64)
    state = np.zeros(2, np.int64)  # how far `order` is read, and how many pairs are deferred
    attempt, batch, retries = 0, 0, RETRIES_PER_PAIR * num_pairs
    while batch < len(batches) and retries >= 0:
        size = _fill_batch(
            batches[batch], attempt, state, order, deferred, used, in_batch, barred, place_of_pair, pairs_by_place,
            starts, next_of_place, neighbors, barred_starts, barred_members, num_hard, rng,
        )  # fmt: skip
        attempt += 1
        if size == batch_size:
            batch += 1
            continue
        # nothing is left that may join. Without its first pair, which may bar the others, they may still fill it
        for i in range(size):
            used[batches[batch, i]] = False
            if i > 0:
                deferred[state[1]] = batches[batch, i]
                state[1] += 1
        retries -= state[1]
        if state[1] < batch_size:
            break
    return batches[:batch]


@numba.njit(cache=True)
def _fill_batch(
    out: Ints,
    attempt: int,
    state: Ints,
    order: Ints,
    deferred: Ints,
    used: NDArray[np.bool_],
    in_batch: Ints,
    barred: Ints,
    place_of_pair: Ints,
    pairs_by_place: Ints,
    starts: Ints,
    next_of_place: Ints,
    neighbors: Ints,
    barred_starts: Ints,
    barred_members: Ints,
    num_hard: int,
    rng: np.random.Generator,
) -> int:  # pragma: no cover (compiled)
    """Fill a batch from the deferred pairs, then from `order`, as far as they go; returns how many joined."""
    chosen = np.empty(num_hard + 1, np.int64)  # an anchor's pair, then its neighbors' pairs
    size, kept, read = 0, 0, 0
    while size < len(out) and (read < state[1] or state[0] < len(order)):
        if read < state[1]:
            anchor = deferred[read]
            read += 1
        else:
            anchor = order[state[0]]
            state[0] += 1
        if used[anchor]:
            continue
        place = place_of_pair[anchor]
        if not _place_is_free(place, attempt, in_batch, barred):
            deferred[kept] = anchor
            kept += 1
            continue
        chosen[0] = anchor
        count = 1 + _neighbor_pairs(
            neighbors[place], num_hard, used, starts, next_of_place, pairs_by_place, rng, chosen[1:]
        )
        for i in range(count):
            place = place_of_pair[chosen[i]]
            if size < len(out) and _place_is_free(place, attempt, in_batch, barred):
                out[size] = chosen[i]
                size += 1
                used[chosen[i]] = True
                in_batch[place] = attempt
                for j in range(barred_starts[place], barred_starts[place + 1]):
                    barred[barred_members[j]] = attempt
    unread = state[1] - read
    deferred[kept : kept + unread] = deferred[read : state[1]].copy()
    state[1] = kept + unread
    return size


@numba.njit(cache=True)
def _neighbor_pairs(
    pool: Ints,
    num_hard: int,
    used: NDArray[np.bool_],
    starts: Ints,
    next_of_place: Ints,
    pairs_by_place: Ints,
    rng: np.random.Generator,
    out: Ints,
) -> int:  # pragma: no cover (compiled)
    """An unused pair of each neighbor: the nearest half always, the other half drawn from the rest of the pool."""
    size = 0
    while size < len(pool) and pool[size] >= 0:
        size += 1
    nearest = min(num_hard // 2, size)
    drawn = min(num_hard - num_hard // 2, size - nearest)
    ranks = np.arange(size)
    for i in range(nearest, nearest + drawn):
        other = rng.integers(i, size)
        ranks[i], ranks[other] = ranks[other], ranks[i]
    count = 0
    for i in range(nearest + drawn):
        place = pool[ranks[i]]
        while next_of_place[place] < starts[place + 1] and used[pairs_by_place[next_of_place[place]]]:
            next_of_place[place] += 1
        if next_of_place[place] < starts[place + 1]:
            out[count] = pairs_by_place[next_of_place[place]]
            count += 1
    return count


@numba.njit(cache=True)
def _hardness(batch_places: Ints, nearest: Ints) -> float:  # pragma: no cover (compiled)
    """Mean over the places of all batches of how many of their `nearest` places share their batch."""
    in_batch = np.full(len(nearest), -1, np.int64)
    total = 0
    for batch in range(len(batch_places)):
        for place in batch_places[batch]:
            in_batch[place] = batch
        for place in batch_places[batch]:
            for neighbor in nearest[place]:
                if neighbor >= 0 and in_batch[neighbor] == batch:
                    total += 1
    return total / max(batch_places.size, 1)
