"""Plans over a tree of geographic cells, for pairs that are too many for one pass.

Places are halved again and again, by pairs, along the longest axis, until a cell holds few enough; the cuts are
drawn anew each epoch. Cells are planned on their own, and what does not fill their batches is planned again in
the cell that both halves make up, up to the whole. The plan is a function of its inputs; who plans which cell
when does not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np

from s4g_ray.arrays import Floats64, Ints, Rows32
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.places import Places
from s4g_ray.data.schema import ProtocolName
from s4g_ray.data.sphere import unit_sphere
from s4g_ray.data.tables.batch_plan import BatchPlan, PlanStats
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.sampling.compact_graph import CompactGraph, IdLookup, find_row
from s4g_ray.sampling.exclusion_table import ExclusionTable
from s4g_ray.sampling.greedy_kernels import PLACE, POSITION, VisitOrder, count_hard, fill_batches
from s4g_ray.sampling.sampler import PLAN_STREAM, check_sizes, rows_of_pairs

ROOT = 1  # the node of the whole; node n is divided into 2 n and 2 n + 1
CUT = (
    0.4,
    0.6,
)  # the share of a cell's pairs that goes into its first half is drawn from this range
Call = Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class PlanOptions:
    """How cells are planned."""

    batch_size: int
    num_hard_negatives: int
    neighbor_pool_size: int
    seed: int
    epoch: int

    def rng(self, *key: int) -> np.random.Generator:
        """The random stream of a step."""
        return np.random.default_rng((self.seed, self.epoch, PLAN_STREAM, *key))


class Cell(NamedTuple):
    """Pairs to be planned together, and what is known of neighbors; places are numbered over the whole."""

    pairs: Ints  # rows of the pair table
    place_of_pair: Rows32
    places: Rows32  # [p] ascending: those whose neighbors follow
    rows: Rows32  # [p, K] int32, nearest first, -1 pads

    @classmethod
    def of_pairs(cls, pairs: Ints, place_of_pair: Rows32) -> Cell:
        """Pairs of whose places nothing is known."""
        return cls(
            pairs, place_of_pair, np.zeros(0, dtype=np.int32), np.zeros((0, 0), dtype=np.int32)
        )

    @classmethod
    def of_graph(cls, places: Rows32, rows: Rows32) -> Cell:
        """Neighbors of places, and no pairs."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32), places, rows)


class Planned(NamedTuple):
    """Full batches of a cell [B, batch_size], rows of the pair table, and how many hard neighbors meet in them."""

    batches: Ints
    num_hard: int


@dataclass(frozen=True)
class CellTree:
    """leaf_of_place[P]: the place's cell; the pairs of cell leaves[i] are pairs[starts[i] : starts[i + 1]]."""

    leaves: list[int]
    leaf_of_place: Rows32
    pairs: Ints
    starts: Ints

    @classmethod
    def divide(
        cls, places: Places, place_of_pair: Rows32, max_pairs: int, options: PlanOptions
    ) -> CellTree:
        """Divide places until no cell has more than max_pairs pairs or it is one place.

        Places without coordinates are divided by their ids beside the others, so that each cell has its share.
        """
        weights, xyz = (
            np.bincount(place_of_pair, minlength=len(places)),
            unit_sphere(places.lat, places.lon),
        )
        leaf_of_place = np.zeros(len(places), dtype=np.int32)
        leaves: list[int] = []
        open_cells = [(ROOT, np.arange(len(places), dtype=np.int32))]
        while open_cells:
            node, rows = open_cells.pop()
            if weights[rows].sum() <= max_pairs or len(rows) < 2:
                leaf_of_place[rows] = len(leaves)
                leaves.append(node)
                continue
            share = options.rng(node).uniform(*CUT)
            first, second = _cut(_in_order(rows, xyz, weights), weights, share)
            open_cells += [(2 * node + 1, second), (2 * node, first)]
        leaf_of_pair = leaf_of_place[place_of_pair]
        starts = np.concatenate([[0], np.cumsum(np.bincount(leaf_of_pair, minlength=len(leaves)))])
        return cls(
            leaves, leaf_of_place, np.argsort(leaf_of_pair, kind="stable"), starts.astype(np.int64)
        )

    def cells(self, place_of_pair: Rows32) -> Iterator[Cell]:
        """The cells in the order of `leaves`, without neighbors."""
        for i in range(len(self.leaves)):
            pairs = self.pairs[self.starts[i] : self.starts[i + 1]]
            yield Cell.of_pairs(pairs, place_of_pair[pairs])


def _in_order(rows: Rows32, xyz: Floats64, weights: Ints) -> Rows32:
    """Places in the order of the coordinate that spreads most, those without one among them, in that of their ids."""
    located = np.isfinite(xyz[rows, 0])
    axis = int(np.argmax(np.ptp(xyz[rows[located]], axis=0))) if located.any() else 0
    shares = []
    groups = rows[located][np.argsort(xyz[rows[located], axis], kind="stable")], rows[~located]
    for group in groups:
        weight = weights[group]
        shares.append(
            (np.cumsum(weight) - weight / 2) / max(weight.sum(), 1)
        )  # of the group's pairs that come before
    return np.asarray(np.concatenate(groups)[np.argsort(np.concatenate(shares), kind="stable")])


def _cut(ordered: Rows32, weights: Ints, share: float) -> tuple[Rows32, Rows32]:
    """Cut two places or more where `share` of their weight is reached; both parts, ascending, have at least one."""
    reached = np.cumsum(weights[ordered])
    at = int(np.clip(np.searchsorted(reached, share * reached[-1]) + 1, 1, len(ordered) - 1))
    return np.sort(ordered[:at]), np.sort(ordered[at:])


def plan_cells(
    pairs: PairTable,
    graph: CompactGraph | None,
    places: Places,
    *,
    batch_size: int,
    num_hard_negatives: int = 64,
    neighbor_pool_size: int = 128,
    seed: int,
    epoch: int,
    protocol: ProtocolName = "strict",
    exclusions: NeighborGraph | Exclusions | None = None,
    max_pairs_per_cell: int,
) -> BatchPlan:
    """As sampler.plan_batches, in cells of at most max_pairs_per_cell pairs, by the coordinates of `places`.

    `graph` is in rows of `places`. Raises ValueError as plan_batches does.
    """
    options = PlanOptions(batch_size, num_hard_negatives, neighbor_pool_size, seed, epoch)
    if graph is not None and not np.array_equal(graph.places, places.ids):
        raise ValueError(
            "the graph is not in rows of the places; make it with CompactGraph.read(uri, places.ids, width)"
        )
    lookup = IdLookup.from_ids(places.ids)
    place_of_pair = rows_of_pairs(pairs, lookup)
    tree = CellTree.divide(places, place_of_pair, max_pairs_per_cell, options)
    bars = ExclusionTable.from_exclusions(exclusions, lookup)
    known = (
        [] if graph is None else [Cell.of_graph(np.arange(len(places), dtype=np.int32), graph.rows)]
    )
    return plan_tree(
        tree, ([cell, *known] for cell in tree.cells(place_of_pair)), bars, options, protocol
    )


def plan_tree(
    tree: CellTree,
    cells: Iterator[Sequence[Any]],
    bars: Any,
    options: PlanOptions,
    protocol: ProtocolName,
    *,
    call: Call = lambda function, *arguments: function(*arguments),
    get: Callable[[Sequence[Any]], Sequence[Planned]] = list,
) -> BatchPlan:
    """Plan the cells of a tree, leaves first; `cells` yields what each leaf is merged from.

    `call` runs plan_cell here or elsewhere and gives handles of its two results; they and `bars` may be handles
    that `call` resolves. `get` fetches plans.
    """
    check_sizes(options.batch_size, options.num_hard_negatives, options.neighbor_pool_size)
    nodes, left = [], {}
    for node, parts in zip(tree.leaves, cells, strict=True):
        planned, left[node] = call(plan_cell, options, node, bars, *parts)
        nodes.append(planned)
    upper: list[Any] = []
    for node in sorted(
        {leaf >> up for leaf in tree.leaves for up in range(1, leaf.bit_length())}, reverse=True
    ):
        planned, left[node] = call(
            plan_cell, options, node, bars, left.pop(2 * node), left.pop(2 * node + 1)
        )
        upper.append(planned)
    done = list(get(nodes + upper))
    batches = _in_turn(
        [cell.batches for cell in done[: len(nodes)]], [cell.batches for cell in done[len(nodes) :]]
    )
    if protocol == "strict":
        batches = batches[options.rng().permutation(len(batches))]
    hardness = sum(cell.num_hard for cell in done) / max(batches.size, 1)
    num_pairs = len(tree.pairs)
    return BatchPlan(
        batches,
        PlanStats(num_pairs, batches.size, num_pairs - batches.size, hardness, len(tree.leaves)),
    )


def _in_turn(leaves: list[Ints], upper: list[Ints]) -> Ints:
    """Batches as built: the cells in turn, each spread over the epoch from hard to easy, then those of leftovers."""
    turns = np.concatenate([(np.arange(len(cell)) + 0.5) / max(len(cell), 1) for cell in leaves])
    return np.concatenate([np.concatenate(leaves)[np.argsort(turns, kind="stable")], *upper])


def plan_cell(
    options: PlanOptions, node: int, bars: ExclusionTable, *parts: Cell
) -> tuple[Planned, Cell]:
    """Plan what the parts hold together: full batches, and the pairs that are left over with their neighbors."""
    cell, local = _merge(parts)
    rng = options.rng(node.bit_length(), node)
    turns = VisitOrder.draw(local.rows(cell.place_of_pair.astype(np.int64)), len(cell.places), rng)
    _number_locally(cell.rows, local)
    built = fill_batches(
        turns,
        cell.rows,
        bars.take(cell.places.astype(np.int64)),
        batch_size=options.batch_size,
        num_hard=options.num_hard_negatives,
        pool_size=options.neighbor_pool_size,
        rng=rng,
    )
    num_hard = count_hard(built[..., PLACE], cell.rows, options.num_hard_negatives, threads=1)
    batches = cell.pairs[turns.pairs[built[..., POSITION]]]
    lost = np.ones(len(cell.pairs), dtype=bool)
    lost[turns.pairs[built[..., POSITION]]] = False
    kept = np.unique(cell.place_of_pair[lost])
    rows = _number_globally(cell.rows[local.rows(kept.astype(np.int64))], cell.places)
    return Planned(batches, num_hard), Cell(cell.pairs[lost], cell.place_of_pair[lost], kept, rows)


def _merge(parts: Sequence[Cell]) -> tuple[Cell, IdLookup]:
    """All pairs of the parts, with what the parts know of the neighbors of their places; and where each place is."""
    pairs, place_of_pair = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    places = np.unique(place_of_pair)
    rows = np.full((len(places), max(part.rows.shape[1] for part in parts)), -1, dtype=np.int32)
    lookup = IdLookup.from_ids(places.astype(np.int64))
    for part in parts:
        at = lookup.rows(part.places.astype(np.int64))
        rows[at[at >= 0], : part.rows.shape[1]] = part.rows[at >= 0]
    return Cell(pairs, place_of_pair, places, rows), lookup


@numba.njit(cache=True, nogil=True)
def _number_locally(rows: Rows32, local: IdLookup) -> None:  # pragma: no cover (compiled)
    """In place (rows may fill most of the memory): rows of the whole -> of the cell; -2 - row where not in the cell."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            if rows[i, j] >= 0:
                row = find_row(local, rows[i, j])
                rows[i, j] = row if row >= 0 else -2 - rows[i, j]


def _number_globally(rows: Rows32, places: Rows32) -> Rows32:
    """The reverse, for some of the rows."""
    found = np.where(rows == -1, np.int32(-1), -2 - rows).astype(np.int32)
    found[rows >= 0] = places[rows[rows >= 0]]
    return found
