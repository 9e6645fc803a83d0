"""Plan which training pairs meet in which global batch.

Sample4Geo's rule (arXiv 2303.11851, section 3.3): a batch starts from a random unused pair and its
neighbors join: half of `num_hard_negatives` are the nearest of the pool, half are drawn at random
from the rest of it. A plan depends on the pairs, the graph, the seed and the epoch, and not on the
number of workers.
"""

from __future__ import annotations

import numpy as np

from s4g_ray.arrays import Ints, Rows32
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.schema import ProtocolName
from s4g_ray.data.tables.batch_plan import BatchPlan, PlanStats
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.sampling.compact_graph import CompactGraph, IdLookup
from s4g_ray.sampling.exclusion_table import ExclusionTable
from s4g_ray.sampling.greedy_kernels import PLACE, POSITION, fill_batches
from s4g_ray.sampling.hardness import count_hard
from s4g_ray.sampling.visit_order import VisitOrder

# keeps the planner's random stream apart from others of the same (seed, epoch)
PLAN_STREAM = 0x706C616E


def plan_batches(
    pairs: PairTable,
    graph: NeighborGraph | CompactGraph | None,
    *,
    batch_size: int,
    num_hard_negatives: int = 64,
    neighbor_pool_size: int = 128,
    seed: int,
    epoch: int,
    protocol: ProtocolName = "strict",
    exclusions: NeighborGraph | Exclusions | None = None,
) -> BatchPlan:
    """Arrange pairs into full batches of `batch_size`; without a graph, at random.

    Each pair is in at most one batch. No place is twice in a batch, and no two places that
    `exclusions` holds in either direction. Pairs that do not fill a batch are left out and counted.
    `strict` shuffles the order of the batches (as built they go from hard to easy); `paper` keeps
    it. Raises ValueError for impossible sizes, and for a pair whose place is not among those of
    CompactGraph. Source: arXiv 2303.11851, section 3.3.
    """
    check_sizes(batch_size, num_hard_negatives, neighbor_pool_size)
    rng = np.random.default_rng((seed, epoch, PLAN_STREAM))
    places = graph.places if isinstance(graph, CompactGraph) else np.unique(pairs.place_ids)
    rows = compact_rows(graph, places, neighbor_pool_size)
    lookup = IdLookup.from_ids(places)
    order = VisitOrder.draw(rows_of_pairs(pairs, lookup), len(places), rng)
    built = fill_batches(
        order,
        rows,
        ExclusionTable.from_exclusions(exclusions, lookup),
        batch_size=batch_size,
        num_hard=num_hard_negatives,
        pool_size=neighbor_pool_size,
        rng=rng,
    )
    num_hard = count_hard(built[..., PLACE], rows, num_hard_negatives)
    hardness = num_hard / max(built.size // 2, 1)
    positions = built[..., POSITION]
    if protocol == "strict":
        positions = positions[rng.permutation(len(positions))]
    stats = PlanStats(len(pairs), positions.size, len(pairs) - positions.size, hardness)
    return BatchPlan(order.pairs[positions].astype(np.int64), stats)


def check_sizes(batch_size: int, num_hard_negatives: int, neighbor_pool_size: int) -> None:
    """Check the sizes of a plan; raises ValueError for impossible ones."""
    if batch_size < 2:
        raise ValueError(
            f"batch_size={batch_size} is below 2: a batch needs a negative; raise it to 2 or more"
        )
    if not 0 <= num_hard_negatives <= neighbor_pool_size:
        raise ValueError(
            f"{num_hard_negatives=} exceeds {neighbor_pool_size=}, or is negative; choose a number"
            f" within 0..{neighbor_pool_size}, or raise the second"
        )


def compact_rows(graph: NeighborGraph | CompactGraph | None, places: Ints, width: int) -> Rows32:
    """Return rows[P, K] of a graph's places; K is 0 without a graph."""
    if graph is None:
        return np.zeros((len(places), 0), dtype=np.int32)
    if isinstance(graph, CompactGraph):
        return graph.rows
    return CompactGraph.from_graph(graph, places, width).rows


def rows_of_pairs(pairs: PairTable, lookup: IdLookup) -> Rows32:
    """Return the row of each pair's place. Raises ValueError when a place has none."""
    rows = lookup.rows(pairs.place_ids)
    lost = pairs.place_ids[rows < 0]
    if len(lost):
        raise ValueError(
            f"{len(lost)} pairs are of places without a row in the graph, the first of {lost[0]};"
            " make the graph of all places with pairs"
        )
    return rows
