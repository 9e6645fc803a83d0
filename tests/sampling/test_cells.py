from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import metres_between
from s4g_ray.data.tables.batch_plan import BatchPlan
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.sampling.cells import Cell, CellTree, PlanOptions, plan_cells, plan_tree
from s4g_ray.sampling.compact_graph import CompactGraph, IdLookup
from s4g_ray.sampling.exclusion_table import ExclusionTable
from s4g_ray.sampling.geographic_neighbors import geographic_graph
from s4g_ray.sampling.sampler import plan_batches, rows_of_pairs


def draw_city(count: int, seed: int, unlocated: float = 0.0) -> Places:
    """Draw places over a square around the antimeridian.

    A share `unlocated` has no coordinates.
    """
    rng = np.random.default_rng(seed)
    side = 0.001 * count**0.5
    lat = rng.uniform(0, side, count)
    lon = (180 - side / 2 + rng.uniform(0, side, count) + 180) % 360 - 180
    lost = rng.random(count) < unlocated
    ids = np.sort(rng.choice(10 * count, count, replace=False))
    return Places(ids, np.where(lost, np.nan, lat), np.where(lost, np.nan, lon))


def draw_pairs(places: Places, seed: int, max_pairs: int = 3) -> PairTable:
    """Draw pairs: each place has 1..max_pairs."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(places.ids, rng.integers(1, max_pairs + 1, len(places))))
    return PairTable(np.arange(len(ids)), np.arange(len(ids)) + 7, ids)


def draw_graph(places: Places, k: int, seed: int) -> NeighborGraph:
    """Draw neighbors, also of ids that are no place; a tenth of the places is not in the graph."""
    rng = np.random.default_rng(seed)
    known = rng.permutation(places.ids)[: max(1, int(0.9 * len(places)))]
    neighbors = np.full((len(known), k), -1, dtype=np.int64)
    for row, place in enumerate(known):
        others = rng.permutation(np.append(places.ids[places.ids != place], 10**9))[
            : rng.integers(0, k + 1)
        ]
        neighbors[row, : len(others)] = others
    return NeighborGraph(known, neighbors)


def options(batch_size: int = 4, seed: int = 1, epoch: int = 1) -> PlanOptions:
    return PlanOptions(batch_size, 6, 12, seed, epoch)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 120), st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0])
)
def test_cells_divide_the_places_and_hold_at_most_the_limit(
    count: int, limit: int, seed: int, unlocated: float
) -> None:
    places = draw_city(count, seed, unlocated)
    pairs = draw_pairs(places, seed)
    place_of_pair = rows_of_pairs(pairs, IdLookup.from_ids(places.ids))
    tree = CellTree.divide(places, place_of_pair, limit, options(seed=seed))
    assert sorted(tree.pairs.tolist()) == list(range(len(pairs)))
    for i in range(len(tree.leaves)):
        held = tree.pairs[tree.starts[i] : tree.starts[i + 1]]
        inside = tree.leaf_of_place[place_of_pair[held]]
        assert (inside == i).all()
        assert 1 <= len(held) <= limit or len(np.unique(place_of_pair[held])) == 1
    # no cell is part of another, and together they are the whole
    for a in tree.leaves:
        assert not any(a == b >> up for b in tree.leaves for up in range(1, b.bit_length()))
    assert sum(2.0 ** (1 - leaf.bit_length()) for leaf in tree.leaves) == pytest.approx(1)


def test_cell_edges_move_with_the_epoch_and_cells_are_compact() -> None:
    places = draw_city(4000, 0)
    place_of_pair = np.arange(4000, dtype=np.int32)
    trees = [CellTree.divide(places, place_of_pair, 600, options(epoch=epoch)) for epoch in (1, 2)]
    assert not np.array_equal(trees[0].leaf_of_place, trees[1].leaf_of_place)
    extents = []
    for leaf in range(len(trees[0].leaves)):
        lat = places.lat[trees[0].leaf_of_place == leaf]
        lon = places.lon[trees[0].leaf_of_place == leaf] % 360
        extents.append(np.ptp(lat) * np.ptp(lon))
    assert sum(extents) < 1.05 * np.ptp(places.lat) * np.ptp(places.lon % 360)


def test_places_without_coordinates_are_spread_over_the_cells_by_their_ids() -> None:
    places = draw_city(4000, 0, unlocated=0.5)
    tree = CellTree.divide(places, np.arange(4000, dtype=np.int32), 600, options())
    lost = np.isnan(places.lat)
    for leaf in range(len(tree.leaves)):
        inside = tree.leaf_of_place == leaf
        assert 0.4 < lost[inside].mean() < 0.6
        own = np.flatnonzero(lost & inside)
        assert np.array_equal(
            own, np.flatnonzero(lost)[np.searchsorted(np.flatnonzero(lost), own[0]) :][: len(own)]
        )


problems: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    count=st.integers(2, 60),
    limit=st.integers(1, 60),
    batch_size=st.integers(2, 8),
    seed=st.integers(0, 2**32),
    unlocated=st.sampled_from([0.0, 0.3, 1.0]),
    radius_m=st.sampled_from([0.0, 150.0]),
    protocol=st.sampled_from(["strict", "paper"]),
)


def solve(
    problem: dict[str, Any],
) -> tuple[Places, PairTable, NeighborGraph, Exclusions, BatchPlan]:
    seed = problem["seed"]
    places = draw_city(problem["count"], seed, problem["unlocated"])
    pairs = draw_pairs(places, seed)
    graph = draw_graph(places, 12, seed)
    named = np.random.default_rng(seed).choice(places.ids, (2, 10))
    exclusions = Exclusions(places, PlacePairs.from_arrays(named[0], named[1]), problem["radius_m"])
    plan = plan_cells(
        pairs,
        CompactGraph.from_graph(graph, places.ids, 12),
        places,
        batch_size=problem["batch_size"],
        num_hard_negatives=6,
        neighbor_pool_size=12,
        seed=seed,
        epoch=3,
        protocol=problem["protocol"],
        exclusions=exclusions,
        max_pairs_per_cell=problem["limit"],
    )
    return places, pairs, graph, exclusions, plan


@settings(max_examples=150, deadline=None)
@given(problems)
def test_over_all_cells_no_pair_is_used_twice_and_no_batch_repeats_or_excludes_a_place(
    problem: dict[str, Any],
) -> None:
    places, pairs, graph, exclusions, plan = solve(problem)
    rows = plan.batches.ravel().tolist()
    assert len(rows) == len(set(rows))
    assert plan.batches.shape[1] == problem["batch_size"]
    neighbors = dict(zip(graph.place_ids.tolist(), graph.neighbors.tolist(), strict=True))
    known = set(places.ids.tolist())
    hardness = 0
    named = set(
        zip(
            exclusions.semi_positives.first.tolist(),
            exclusions.semi_positives.second.tolist(),
            strict=True,
        )
    )
    for batch in plan.batches:
        met = pairs.place_ids[batch].tolist()
        assert len(set(met)) == len(met)
        for place in met:
            nearest = [n for n in neighbors.get(place, []) if n in known][:6]
            hardness += len(set(nearest) & set(met))
            for other in met:
                a, b = np.searchsorted(places.ids, [place, other])
                metres = metres_between(places.lat[a], places.lon[a], places.lat[b], places.lon[b])
                assert place == other or not (
                    (place, other) in named or metres <= exclusions.radius_m
                )
    assert (plan.stats.num_pairs, plan.stats.num_planned) == (len(pairs), len(rows))
    assert plan.stats.num_left_out == len(pairs) - len(rows)
    assert plan.stats.hardness == pytest.approx(hardness / max(len(rows), 1))


def test_pairs_left_over_in_cells_fill_batches_of_the_cells_above() -> None:
    places = draw_city(1000, 5)
    pairs = PairTable(*[places.ids] * 3)
    options: dict[str, Any] = {"batch_size": 64, "seed": 0, "epoch": 0}
    # no cell holds enough pairs for a batch
    plan = plan_cells(pairs, None, places, max_pairs_per_cell=40, **options)
    assert plan.stats.num_cells > 20
    assert plan.stats.num_left_out == 1000 % 64


def test_the_plan_does_not_depend_on_where_and_when_cells_are_planned() -> None:
    places = draw_city(3000, 2)
    pairs = draw_pairs(places, 2)
    graph = CompactGraph.from_graph(geographic_graph(places, 24), places.ids, 24)
    settings = PlanOptions(16, 12, 24, 5, 6)
    sizes: dict[str, Any] = {"batch_size": 16, "num_hard_negatives": 12, "neighbor_pool_size": 24}
    alone = plan_cells(pairs, graph, places, seed=5, epoch=6, max_pairs_per_cell=500, **sizes)
    lookup = IdLookup.from_ids(places.ids)
    place_of_pair = rows_of_pairs(pairs, lookup)
    tree = CellTree.divide(places, place_of_pair, 500, settings)
    known = Cell.from_graph(np.arange(3000, dtype=np.int32), graph.rows)
    cells = ([cell, known] for cell in tree.cells(place_of_pair))

    def call(function: Any, *arguments: Any) -> tuple[Any, Any]:
        run = functools.cache(lambda: function(*(a() if callable(a) else a for a in arguments)))
        return lambda: run()[0], lambda: run()[1]

    def get(handles: Sequence[Any]) -> list[Any]:
        found = {i: handles[i]() for i in np.random.default_rng(8).permutation(len(handles))}
        return [found[i] for i in range(len(handles))]

    spread = plan_tree(
        tree,
        cells,
        ExclusionTable.from_exclusions(None, lookup),
        settings,
        "strict",
        call=call,
        get=get,
    )
    assert np.array_equal(alone.batches, spread.batches)
    assert alone.stats == spread.stats


def test_hardness_in_cells_is_within_a_tenth_of_one_pass() -> None:
    places = draw_city(200_000, 0)
    pairs = PairTable(*[places.ids] * 3)
    graph = CompactGraph.from_graph(geographic_graph(places, 128), places.ids, 128)
    whole = plan_batches(pairs, graph, batch_size=128, seed=0, epoch=0).stats
    cells = plan_cells(
        pairs, graph, places, batch_size=128, seed=0, epoch=0, max_pairs_per_cell=25_000
    ).stats
    assert cells.num_cells >= 8
    assert cells.hardness > 0.9 * whole.hardness
    assert cells.num_left_out < 128


def test_a_graph_of_other_places_is_refused() -> None:
    places = draw_city(20, 0)
    graph = CompactGraph(places.ids[1:], np.full((19, 2), -1, dtype=np.int32))
    with pytest.raises(ValueError, match="not in rows of the places"):
        plan_cells(
            PairTable(*[places.ids] * 3),
            graph,
            places,
            batch_size=2,
            seed=0,
            epoch=0,
            max_pairs_per_cell=5,
        )
