"""Plan batches over a tree of geographic cells, for pairs that are too many for one pass.

Places are halved again and again, by pairs, along the longest axis, until a cell holds few enough
pairs; the cuts are drawn anew each epoch. Each cell is planned alone, and pairs that do not fill a
batch are planned again in the cell that both halves make up, up to the whole. The plan is a
function of its inputs: which process plans which cell, and when, does not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np

from s4g_ray.arrays import Floats32, Ints, Rows32
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.places import Places
from s4g_ray.data.schema import ProtocolName
from s4g_ray.data.sphere import unit_sphere32, widest_axis
from s4g_ray.data.tables.batch_plan import BatchPlan, PlanStats
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.sampling.compact_graph import CompactGraph, IdLookup, find_row
from s4g_ray.sampling.exclusion_table import ExclusionTable
from s4g_ray.sampling.greedy_kernels import PLACE, POSITION, fill_batches
from s4g_ray.sampling.hardness import count_hard
from s4g_ray.sampling.sampler import PLAN_STREAM, check_sizes, rows_of_pairs
from s4g_ray.sampling.visit_order import VisitOrder

ROOT = 1  # the node of the whole; node n is divided into 2 n and 2 n + 1
# the share of a cell's pairs that goes into its first half is drawn from this range
CUT = (0.4, 0.6)
PLANNER_CPUS = 0.5  # logical CPUs of a task that splits a part of a graph or plans a cell
Call = Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class PlanOptions:
    """The sizes and the random stream of a plan."""

    batch_size: int
    num_hard_negatives: int
    neighbor_pool_size: int
    seed: int
    epoch: int

    def rng(self, *key: int) -> np.random.Generator:
        """Return the random stream of a step of the plan."""
        return np.random.default_rng((self.seed, self.epoch, PLAN_STREAM, *key))


class Cell(NamedTuple):
    """Pairs to be planned together, and the known neighbors of places.

    Places are rows of all places.
    """

    pairs: Ints  # rows of the pair table
    place_of_pair: Rows32
    places: Rows32  # [p] ascending: those whose neighbors follow
    rows: Rows32  # [p, K] int32, nearest first, -1 pads

    @classmethod
    def from_pairs(cls, pairs: Ints, place_of_pair: Rows32) -> Cell:
        """Return a cell of pairs, without neighbors."""
        no_places = np.zeros(0, dtype=np.int32)
        no_rows = np.zeros((0, 0), dtype=np.int32)
        return cls(pairs, place_of_pair, no_places, no_rows)

    @classmethod
    def from_graph(cls, places: Rows32, rows: Rows32) -> Cell:
        """Return a cell of places with neighbors, without pairs."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32), places, rows)


class Planned(NamedTuple):
    """The plan of a cell."""

    batches: Ints  # [B, batch_size] full batches, as rows of the pair table
    num_hard: int  # hard neighbors that meet in them


@dataclass(frozen=True)
class CellTree:
    """The cells of all places and pairs."""

    leaves: list[int]  # nodes
    leaf_of_place: Rows32  # [P]: the place's cell, an index of `leaves`
    pairs: Ints  # the pairs of cell leaves[i] are pairs[starts[i] : starts[i + 1]]
    starts: Ints

    @classmethod
    def divide(
        cls, places: Places, place_of_pair: Rows32, max_pairs: int, options: PlanOptions
    ) -> CellTree:
        """Divide places until each cell has at most max_pairs pairs or is one place.

        Places without coordinates are divided by their ids beside the others, so that each cell has
        its share of them.
        """
        weights = np.bincount(place_of_pair, minlength=len(places)).astype(np.int32)
        xyz = unit_sphere32(places.lat, places.lon)
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
            first, second = _cut_places(_order_places(rows, xyz, weights), weights, share)
            open_cells.append((2 * node + 1, second))
            open_cells.append((2 * node, first))
        del xyz, weights
        leaf_of_pair = leaf_of_place[place_of_pair]
        counts = np.bincount(leaf_of_pair, minlength=len(leaves))
        return cls(
            leaves=leaves,
            leaf_of_place=leaf_of_place,
            pairs=np.argsort(leaf_of_pair, kind="stable"),
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        )

    def cells(self, place_of_pair: Rows32) -> Iterator[Cell]:
        """Yield the cells in the order of `leaves`, without neighbors."""
        for i in range(len(self.leaves)):
            pairs = self.pairs[self.starts[i] : self.starts[i + 1]]
            yield Cell.from_pairs(pairs, place_of_pair[pairs])


def _order_places(rows: Rows32, xyz: Floats32, weights: Rows32) -> Rows32:
    """Order places by the coordinate that spreads most.

    Places without coordinates are spread evenly among them, in the order of their ids.
    """
    is_located = np.isfinite(xyz[rows, 0])
    if is_located.all():
        return _sort_located(rows, xyz)
    groups = [_sort_located(rows[is_located], xyz), rows[~is_located]]
    shares = []  # of the group's pairs, those of the places before each place
    for group in groups:
        weight = weights[group]
        shares.append((np.cumsum(weight) - weight / 2) / max(weight.sum(), 1))
    return np.asarray(np.concatenate(groups)[np.argsort(np.concatenate(shares), kind="stable")])


def _sort_located(rows: Rows32, xyz: Floats32) -> Rows32:
    """Sort places by the coordinate that spreads most."""
    if not len(rows):
        return rows
    return rows[np.argsort(xyz[rows, widest_axis(xyz, rows)], kind="stable")]


def _cut_places(ordered: Rows32, weights: Rows32, share: float) -> tuple[Rows32, Rows32]:
    """Cut two places or more where `share` of their weight is reached.

    Both parts, ascending, have at least one place.
    """
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
    """Plan batches as sampler.plan_batches does, in cells of at most max_pairs_per_cell pairs.

    Cells are divided by the coordinates of `places`; `graph` is in rows of `places`. Raises
    ValueError as plan_batches does.
    """
    options = PlanOptions(batch_size, num_hard_negatives, neighbor_pool_size, seed, epoch)
    if graph is not None and not np.array_equal(graph.places, places.ids):
        raise ValueError(
            "the graph is not in rows of the places; make it with"
            " CompactGraph.read(uri, places.ids, width)"
        )
    lookup = IdLookup.from_ids(places.ids)
    place_of_pair = rows_of_pairs(pairs, lookup)
    tree = CellTree.divide(places, place_of_pair, max_pairs_per_cell, options)
    known: list[Cell] = []
    if graph is not None:
        known.append(Cell.from_graph(np.arange(len(places), dtype=np.int32), graph.rows))
    cells = ([cell, *known] for cell in tree.cells(place_of_pair))
    table = ExclusionTable.from_exclusions(exclusions, lookup)
    return plan_tree(tree, cells, table, options, protocol)


def plan_tree(
    tree: CellTree,
    cells: Iterator[Sequence[Any]],
    exclusions: Any,
    options: PlanOptions,
    protocol: ProtocolName,
    *,
    call: Call = lambda function, *arguments: function(*arguments),
    get: Callable[[Sequence[Any]], Sequence[Planned]] = list,
) -> BatchPlan:
    """Plan the cells of a tree, leaves first; `cells` yields the parts of each leaf.

    `call` runs plan_cell here or elsewhere and returns handles of its two results. Parts and
    `exclusions` (an ExclusionTable) may be handles that `call` resolves. `get` fetches plans.
    """
    check_sizes(options.batch_size, options.num_hard_negatives, options.neighbor_pool_size)
    handles: list[Any] = []
    left_over: dict[int, Any] = {}  # of each planned node that is not merged yet
    for node, parts in zip(tree.leaves, cells, strict=True):
        planned, left_over[node] = call(plan_cell, options, node, exclusions, *parts)
        handles.append(planned)
    upper_nodes = {leaf >> up for leaf in tree.leaves for up in range(1, leaf.bit_length())}
    for node in sorted(upper_nodes, reverse=True):
        halves = (left_over.pop(2 * node), left_over.pop(2 * node + 1))
        planned, left_over[node] = call(plan_cell, options, node, exclusions, *halves)
        handles.append(planned)
    done = list(get(handles))
    batches_of_cells = [cell.batches for cell in done]
    num_leaves = len(tree.leaves)
    batches = _order_batches(batches_of_cells[:num_leaves], batches_of_cells[num_leaves:])
    if protocol == "strict":
        batches = batches[options.rng().permutation(len(batches))]
    hardness = sum(cell.num_hard for cell in done) / max(batches.size, 1)
    num_pairs = len(tree.pairs)
    num_left_out = num_pairs - batches.size
    return BatchPlan(
        batches, PlanStats(num_pairs, batches.size, num_left_out, hardness, num_leaves)
    )


def _order_batches(leaves: list[Ints], upper: list[Ints]) -> Ints:
    """Order batches as built: those of the leaves in turn, then those of left-over pairs.

    The batches of each leaf are spread over the epoch from hard to easy.
    """
    turns = np.concatenate([(np.arange(len(cell)) + 0.5) / max(len(cell), 1) for cell in leaves])
    return np.concatenate([np.concatenate(leaves)[np.argsort(turns, kind="stable")], *upper])


def plan_cell(
    options: PlanOptions, node: int, exclusions: ExclusionTable, *parts: Cell
) -> tuple[Planned, Cell]:
    """Plan the pairs of all parts; return full batches, and the left-over pairs with neighbors."""
    cell, local = _merge_parts(parts)
    rng = options.rng(node.bit_length(), node)
    order = VisitOrder.draw(local.rows(cell.place_of_pair.astype(np.int64)), len(cell.places), rng)
    _number_locally(cell.rows, local)
    built = fill_batches(
        order,
        cell.rows,
        exclusions.take(cell.places.astype(np.int64)),
        batch_size=options.batch_size,
        num_hard=options.num_hard_negatives,
        pool_size=options.neighbor_pool_size,
        rng=rng,
    )
    num_hard = count_hard(built[..., PLACE], cell.rows, options.num_hard_negatives, num_threads=1)
    used = order.pairs[built[..., POSITION]]
    planned = Planned(cell.pairs[used], num_hard)
    is_left = np.ones(len(cell.pairs), dtype=bool)
    is_left[used] = False
    place_of_left = cell.place_of_pair[is_left]
    places = np.unique(place_of_left)
    rows = _number_globally(cell.rows[local.rows(places.astype(np.int64))], cell.places)
    return planned, Cell(cell.pairs[is_left], place_of_left, places, rows)


def _merge_parts(parts: Sequence[Cell]) -> tuple[Cell, IdLookup]:
    """Join the pairs of all parts, with the known neighbors of their places.

    Also returns the lookup of the places.
    """
    pairs = np.concatenate([part.pairs for part in parts])
    place_of_pair = np.concatenate([part.place_of_pair for part in parts])
    places = np.unique(place_of_pair)
    rows = np.full((len(places), max(part.rows.shape[1] for part in parts)), -1, dtype=np.int32)
    lookup = IdLookup.from_ids(places.astype(np.int64))
    for part in parts:
        at = lookup.rows(part.places.astype(np.int64))
        rows[at[at >= 0], : part.rows.shape[1]] = part.rows[at >= 0]
    return Cell(pairs, place_of_pair, places, rows), lookup


@numba.njit(cache=True, nogil=True)
def _number_locally(rows: Rows32, local: IdLookup) -> None:  # pragma: no cover (compiled)
    """Replace rows of all places by rows of the cell's; -2 - row for places outside of the cell.

    Works in place, because `rows` may fill nearly all memory.
    """
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            if rows[i, j] >= 0:
                row = find_row(local, rows[i, j])
                rows[i, j] = row if row >= 0 else -2 - rows[i, j]


def _number_globally(rows: Rows32, places: Rows32) -> Rows32:
    """Return rows of all places for rows of the cell's: the reverse of _number_locally."""
    found = np.where(rows == -1, np.int32(-1), -2 - rows).astype(np.int32)
    found[rows >= 0] = places[rows[rows >= 0]]
    return found
