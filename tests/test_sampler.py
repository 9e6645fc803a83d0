from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.neighbors import NeighborGraph, geographic_graph
from s4g_ray.sampler import BatchPlan, PairTable, load_plan, plan_batches


def make_pairs(places: list[int]) -> PairTable:
    ids = np.arange(len(places))
    return PairTable(ids + 10, ids + 20, np.asarray(places, dtype=np.int64))


def random_graph(places: np.ndarray[Any, np.dtype[np.int64]], k: int, seed: int) -> NeighborGraph:
    """A graph with pads, and with neighbors that have no pair."""
    rng = np.random.default_rng(seed)
    neighbors = np.full((len(places), k), -1, dtype=np.int64)
    for row, place in enumerate(places):
        others = rng.permutation(np.append(places[places != place], 10_000))[:k]
        neighbors[row, : len(others)] = others
    return NeighborGraph(places, neighbors)


problems: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    places=st.lists(st.integers(0, 25), min_size=0, max_size=80),
    batch_size=st.integers(2, 12),
    k=st.integers(0, 10),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 50),
    with_graph=st.booleans(),
    with_exclusions=st.booleans(),
    protocol=st.sampled_from(["strict", "paper"]),
)


def solve(problem: dict[str, Any]) -> tuple[PairTable, NeighborGraph | None, NeighborGraph | None, BatchPlan]:
    pairs = make_pairs(problem["places"])
    known = np.unique(pairs.place_ids)
    graph = random_graph(known, 12, problem["seed"]) if problem["with_graph"] else None
    exclusions = random_graph(known, 2, problem["seed"] + 1) if problem["with_exclusions"] else None
    plan = plan_batches(
        pairs, graph, batch_size=problem["batch_size"], num_hard_negatives=problem["k"], neighbor_pool_size=12,
        seed=problem["seed"], epoch=problem["epoch"], protocol=problem["protocol"], exclusions=exclusions,
    )  # fmt: skip
    return pairs, graph, exclusions, plan


@settings(max_examples=300, deadline=None)
@given(problems)
def test_each_pair_at_most_once_no_place_twice_and_no_excluded_places_together(problem: dict[str, Any]) -> None:
    pairs, graph, exclusions, plan = solve(problem)
    rows = plan.batches.ravel().tolist()
    assert plan.batches.shape[1] == problem["batch_size"]
    assert len(rows) == len(set(rows))
    barred = set()
    if exclusions is not None:
        for place, others in zip(exclusions.place_ids.tolist(), exclusions.neighbors.tolist(), strict=True):
            barred |= {frozenset((place, other)) for other in others if other >= 0}
    hardness = 0
    for batch in plan.batches:
        places = pairs.place_ids[batch].tolist()
        assert len(set(places)) == len(places)
        assert not any(frozenset((a, b)) in barred for a in places for b in places if a != b)
        for place in places:
            if graph is None:
                break
            pool = [n for n in graph.neighbors[graph.place_ids == place][0].tolist() if 0 <= n < 10_000]
            hardness += len(set(pool[: problem["k"]]) & set(places))
    stats = plan.stats
    assert (stats.num_pairs, stats.num_planned) == (len(pairs), len(rows))
    assert stats.num_left_out == len(pairs) - len(rows)
    assert stats.hardness == pytest.approx(hardness / max(len(rows), 1))


@settings(max_examples=50, deadline=None)
@given(problems)
def test_a_plan_is_a_function_of_its_inputs(problem: dict[str, Any]) -> None:
    assert np.array_equal(solve(problem)[3].batches, solve(problem)[3].batches)


def test_seed_and_epoch_change_the_plan() -> None:
    pairs = make_pairs(list(range(64)))

    def plan(seed: int, epoch: int) -> list[list[int]]:
        return plan_batches(pairs, None, batch_size=8, seed=seed, epoch=epoch).batches.tolist()  # type: ignore[no-any-return]

    assert plan(1, 1) != plan(1, 2)
    assert plan(1, 1) != plan(2, 1)


def test_without_repeated_places_only_the_incomplete_batch_is_left_out() -> None:
    plan = plan_batches(make_pairs(list(range(100))), None, batch_size=16, seed=0, epoch=0)
    assert (plan.batches.shape, plan.stats.num_left_out) == ((6, 16), 4)


def test_more_pairs_than_batches_can_hold_of_one_place_are_left_out() -> None:
    plan = plan_batches(make_pairs([1] * 10 + [2, 3, 4]), None, batch_size=2, seed=0, epoch=0)
    assert len(plan.batches) == 3
    assert plan.stats.num_left_out == 7


def test_the_nearest_half_joins_always_and_the_rest_is_drawn_from_the_pool() -> None:
    """With one batch's anchor known, its neighbors are the 3 nearest and 3 of the next 9, never beyond."""
    places = np.arange(200)
    ring = (places[:, None] + np.arange(1, 41)[None, :]) % 200
    graph = NeighborGraph(places, ring)
    drawn = set()
    for seed in range(60):
        plan = plan_batches(
            make_pairs(places.tolist()), graph, batch_size=7, num_hard_negatives=6, neighbor_pool_size=12,
            seed=seed, epoch=0, protocol="paper",
        )  # fmt: skip
        anchor, *joined = plan.batches[0].tolist()
        steps = [(place - anchor) % 200 for place in joined]
        assert steps[:3] == [1, 2, 3]
        assert all(4 <= step <= 12 for step in steps[3:])
        drawn |= set(steps[3:])
    assert drawn == set(range(4, 13))


def test_geographic_batches_are_harder_than_random_ones_and_strict_shuffles_their_order() -> None:
    rng = np.random.default_rng(0)
    places = np.arange(600)
    graph = geographic_graph(places, rng.uniform(0, 1, 600), rng.uniform(0, 1, 600), 24)
    pairs = make_pairs(places.tolist())
    options: dict[str, Any] = {
        "batch_size": 24,
        "num_hard_negatives": 16,
        "neighbor_pool_size": 24,
        "seed": 1,
        "epoch": 1,
    }
    hard, paper = plan_batches(pairs, graph, **options), plan_batches(pairs, graph, protocol="paper", **options)
    random = plan_batches(pairs, None, **options)
    chance = 16 * 23 / 599
    assert hard.stats.hardness > 5 * chance
    assert random.stats.hardness == 0
    assert not np.array_equal(hard.batches, paper.batches)
    assert sorted(map(tuple, hard.batches)) == sorted(map(tuple, paper.batches))


def test_a_saved_plan_gives_its_pairs_by_batch_and_slot(tmp_path: Path) -> None:
    pairs = make_pairs(list(range(20)))
    plan = plan_batches(pairs, None, batch_size=4, seed=0, epoch=0)
    uri = str(tmp_path / "epoch=0001.parquet")
    plan.save(uri, pairs, graph="none")
    query_ids, reference_ids = load_plan(uri)
    assert np.array_equal(query_ids, pairs.query_ids[plan.batches])
    assert np.array_equal(reference_ids, pairs.reference_ids[plan.batches])
    table = pq.read_table(uri)
    assert table.schema.metadata[b"s4g.graph"] == b"none"
    assert [str(t) for t in table.schema.types] == ["int32", "int32", "int64", "int64"]


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=1"):
        plan_batches(make_pairs([1, 2]), None, batch_size=1, seed=0, epoch=0)
    with pytest.raises(ValueError, match="num_hard_negatives=9 exceeds"):
        plan_batches(
            make_pairs([1, 2]), None, batch_size=2, num_hard_negatives=9, neighbor_pool_size=8, seed=0, epoch=0
        )


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_a_place_that_bars_nearly_all_others_costs_little_more_than_itself(share: float) -> None:
    places = np.arange(400)
    others = places[1 : 1 + int(share * 399)]
    hub = NeighborGraph(np.array([0]), others[None, :])
    for epoch in range(12):
        plan = plan_batches(make_pairs(places.tolist()), None, batch_size=8, seed=0, epoch=epoch, exclusions=hub)
        assert plan.stats.num_left_out <= 8
