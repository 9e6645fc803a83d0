from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import metres_between
from s4g_ray.data.tables.batch_plan import BatchPlan, load_gallery, load_plan
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.sampling.compact_graph import CompactGraph
from s4g_ray.sampling.geographic_neighbors import geographic_graph
from s4g_ray.sampling.sampler import plan_batches


def make_pairs(places: list[int]) -> PairTable:
    ids = np.arange(len(places))
    return PairTable(ids + 10, ids + 20, np.asarray(places, dtype=np.int64))


def random_graph(places: np.ndarray[Any, np.dtype[np.int64]], k: int, seed: int) -> NeighborGraph:
    """Return a graph with pads, and with neighbors that have no pair."""
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


def solve(
    problem: dict[str, Any],
) -> tuple[PairTable, NeighborGraph | None, NeighborGraph | None, BatchPlan]:
    pairs = make_pairs(problem["places"])
    known = np.unique(pairs.place_ids)
    graph = random_graph(known, 12, problem["seed"]) if problem["with_graph"] else None
    exclusions = random_graph(known, 2, problem["seed"] + 1) if problem["with_exclusions"] else None
    plan = plan_batches(
        pairs,
        graph,
        batch_size=problem["batch_size"],
        num_hard_negatives=problem["k"],
        neighbor_pool_size=12,
        seed=problem["seed"],
        epoch=problem["epoch"],
        protocol=problem["protocol"],
        exclusions=exclusions,
    )
    return pairs, graph, exclusions, plan


@settings(max_examples=300, deadline=None)
@given(problems)
def test_no_pair_is_used_twice_and_no_batch_repeats_a_place_or_holds_excluded_places(
    problem: dict[str, Any],
) -> None:
    pairs, graph, exclusions, plan = solve(problem)
    rows = plan.batches.ravel().tolist()
    assert plan.batches.shape[1] == problem["batch_size"]
    assert len(rows) == len(set(rows))
    excluded = set()
    if exclusions is not None:
        for place, others in zip(
            exclusions.place_ids.tolist(), exclusions.neighbors.tolist(), strict=True
        ):
            excluded |= {frozenset((place, other)) for other in others if other >= 0}
    hardness = 0
    for batch in plan.batches:
        places = pairs.place_ids[batch].tolist()
        assert len(set(places)) == len(places)
        assert not any(frozenset((a, b)) in excluded for a in places for b in places if a != b)
        for place in places:
            if graph is None:
                break
            pool = [
                n for n in graph.neighbors[graph.place_ids == place][0].tolist() if 0 <= n < 10_000
            ]
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
    """The first batch holds an anchor, its 3 nearest neighbors, and 3 of the next 9."""
    places = np.arange(200)
    ring = (places[:, None] + np.arange(1, 41)[None, :]) % 200
    graph = NeighborGraph(places, ring)
    drawn = set()
    for seed in range(60):
        plan = plan_batches(
            make_pairs(places.tolist()),
            graph,
            batch_size=7,
            num_hard_negatives=6,
            neighbor_pool_size=12,
            seed=seed,
            epoch=0,
            protocol="paper",
        )
        anchor, *joined = plan.batches[0].tolist()
        steps = [(place - anchor) % 200 for place in joined]
        assert steps[:3] == [1, 2, 3]
        assert all(4 <= step <= 12 for step in steps[3:])
        drawn |= set(steps[3:])
    assert drawn == set(range(4, 13))


def test_geographic_batches_are_harder_than_random_ones_and_strict_shuffles_their_order() -> None:
    rng = np.random.default_rng(0)
    places = np.arange(600)
    graph = geographic_graph(Places(places, rng.uniform(0, 1, 600), rng.uniform(0, 1, 600)), 24)
    pairs = make_pairs(places.tolist())
    options: dict[str, Any] = {
        "batch_size": 24,
        "num_hard_negatives": 16,
        "neighbor_pool_size": 24,
        "seed": 1,
        "epoch": 1,
    }
    hard = plan_batches(pairs, graph, **options)
    paper = plan_batches(pairs, graph, protocol="paper", **options)
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
            make_pairs([1, 2]),
            None,
            batch_size=2,
            num_hard_negatives=9,
            neighbor_pool_size=8,
            seed=0,
            epoch=0,
        )


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_a_place_that_excludes_nearly_all_others_costs_at_most_one_batch(share: float) -> None:
    places = np.arange(400)
    others = places[1 : 1 + int(share * 399)]
    hub = NeighborGraph(np.array([0]), others[None, :])
    for epoch in range(12):
        plan = plan_batches(
            make_pairs(places.tolist()), None, batch_size=8, seed=0, epoch=epoch, exclusions=hub
        )
        assert plan.stats.num_left_out <= 8


@settings(max_examples=100, deadline=None)
@given(problems)
def test_a_graph_in_rows_gives_the_plan_of_the_graph(problem: dict[str, Any]) -> None:
    pairs, graph, exclusions, plan = solve({**problem, "with_graph": True})
    assert graph is not None
    rows = CompactGraph.from_graph(graph, np.unique(pairs.place_ids), 12)
    again = plan_batches(
        pairs,
        rows,
        batch_size=problem["batch_size"],
        num_hard_negatives=problem["k"],
        neighbor_pool_size=12,
        seed=problem["seed"],
        epoch=problem["epoch"],
        protocol=problem["protocol"],
        exclusions=exclusions,
    )
    assert np.array_equal(again.batches, plan.batches)
    assert again.stats == plan.stats


def test_a_pair_of_a_place_that_has_no_row_is_refused() -> None:
    rows = CompactGraph(np.array([1, 2]), np.full((2, 3), -1, dtype=np.int32))
    with pytest.raises(
        ValueError, match="1 pairs are of places without a row in the graph, the first of 7"
    ):
        plan_batches(make_pairs([1, 7, 2]), rows, batch_size=2, seed=0, epoch=0)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(2, 9),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 30.0, 300.0, 2e7]),
    st.integers(0, 20),
    st.booleans(),
)
def test_no_two_places_within_the_radius_and_no_semi_positives_share_a_batch(
    count: int, batch_size: int, seed: int, radius_m: float, num_named: int, at_the_pole: bool
) -> None:
    rng = np.random.default_rng(seed)
    if at_the_pole:
        lat = 89.999 + rng.uniform(0, 0.001, count)
        lon = rng.uniform(-180, 180, count)
    else:
        lat = rng.uniform(-0.005, 0.005, count)
        lon = (180 + rng.uniform(-0.005, 0.005, count) + 180) % 360 - 180
    lat[rng.random(count) < 0.1] = np.nan
    places = Places(np.arange(count) * 3, lat, lon)
    named = PlacePairs.from_arrays(*rng.choice(places.ids, (2, num_named)))
    exclusions = Exclusions(places, named, radius_m)
    pairs = make_pairs(rng.choice([*places.ids, 20_000, 20_001], 3 * count).tolist())
    plan = plan_batches(
        pairs,
        random_graph(np.unique(pairs.place_ids), 6, seed),
        batch_size=batch_size,
        num_hard_negatives=4,
        neighbor_pool_size=6,
        seed=seed,
        epoch=0,
        exclusions=exclusions,
    )
    excluded = set(zip(named.first.tolist(), named.second.tolist(), strict=True))
    for batch in plan.batches:
        met = pairs.place_ids[batch].tolist()
        assert len(set(met)) == batch_size
        assert not any((a, b) in excluded for a in met for b in met)
        at = [place // 3 for place in met if place < 20_000]
        metres = metres_between(lat[at][:, None], lon[at][:, None], lat[at], lon[at])
        # each place is near itself only
        assert radius_m == 0 or (metres <= radius_m).sum() == np.isfinite(lat[at]).sum()


def test_with_a_radius_that_leaves_room_only_an_incomplete_batch_is_left_out() -> None:
    rng = np.random.default_rng(0)
    # 100 in a square km
    places = Places(np.arange(3000), rng.uniform(0, 0.05, 3000), rng.uniform(0, 0.05, 3000))
    graph = geographic_graph(places, 32)
    exclusions = Exclusions(
        places, PlacePairs.from_arrays(*np.zeros((2, 0), dtype=np.int64)), 100.0
    )
    pairs = PairTable(*[places.ids] * 3)
    plan = plan_batches(
        pairs,
        graph,
        batch_size=64,
        num_hard_negatives=16,
        neighbor_pool_size=32,
        seed=0,
        epoch=0,
        exclusions=exclusions,
    )
    assert plan.stats.num_left_out <= 3000 % 64


@pytest.mark.parametrize("with_graph", [False, True])
def test_with_many_pairs_of_each_place_only_those_of_the_last_few_places_are_left_out(
    with_graph: bool,
) -> None:
    """University-1652: 701 buildings with 54 drone images each."""
    places = np.arange(701)
    graph = random_graph(places, 128, 0) if with_graph else None
    pairs = make_pairs(np.repeat(places, 54).tolist())
    plan = plan_batches(pairs, graph, batch_size=128, seed=0, epoch=0)
    left = np.delete(pairs.place_ids, plan.batches.ravel())
    assert len(np.unique(left)) < 128
    assert len(left) < 0.02 * len(pairs)


@pytest.mark.parametrize("num_places", [128, 131])
def test_all_pairs_of_little_more_places_than_a_batch_holds_are_used(num_places: int) -> None:
    pairs = make_pairs(np.repeat(np.arange(num_places), 2000).tolist())
    plan = plan_batches(pairs, None, batch_size=128, seed=0, epoch=0)
    assert plan.stats.num_left_out < 0.02 * len(pairs)


def test_pairs_of_fewer_places_than_a_batch_holds_are_left_out_at_once() -> None:
    plan = plan_batches(
        make_pairs(np.repeat(np.arange(100), 5000).tolist()), None, batch_size=128, seed=0, epoch=0
    )
    assert plan.batches.shape == (0, 128)
    assert plan.stats.num_left_out == 500_000


def test_two_groups_that_exclude_each_other_get_batches_of_their_own() -> None:
    places = np.arange(64)
    groups = NeighborGraph(places[:32], np.broadcast_to(places[32:], (32, 32)))
    plan = plan_batches(
        make_pairs(places.tolist()), None, batch_size=16, seed=0, epoch=0, exclusions=groups
    )
    assert plan.stats.num_left_out == 0
    assert all(len({int(place) // 32 for place in batch}) == 1 for batch in plan.batches)


def test_hardness_is_level_over_an_epoch_in_strict_and_falls_in_paper() -> None:
    rng = np.random.default_rng(0)
    places = Places(np.arange(40_000), rng.uniform(0, 0.2, 40_000), rng.uniform(0, 0.2, 40_000))
    graph = CompactGraph.from_graph(geographic_graph(places, 128), places.ids, 128)
    pairs = PairTable(*[places.ids] * 3)

    def hardness_by_tenth(protocol: Any) -> list[float]:
        batches = plan_batches(
            pairs, graph, batch_size=128, seed=0, epoch=0, protocol=protocol
        ).batches
        hard = [np.isin(graph.rows[batch, :64], batch).sum() / 128 for batch in batches]
        return [float(part.mean()) for part in np.array_split(np.array(hard), 10)]

    strict = hardness_by_tenth("strict")
    paper = hardness_by_tenth("paper")
    assert max(strict) < 1.35 * min(strict)
    assert paper[0] > 2 * paper[-1]
    assert np.mean(strict) == pytest.approx(np.mean(paper), rel=0.01)


def test_gallery_rows_of_a_plan_are_kept_apart_from_its_pairs(tmp_path: Path) -> None:
    pairs = make_pairs(list(range(20)))
    plan = plan_batches(pairs, None, batch_size=4, seed=0, epoch=0)
    gallery = np.array([[7, -1, 8], [-1, -1, -1], [9, 7, -1], [1, 2, 3], [-1, -1, 5]])
    uri = str(tmp_path / "plan.parquet")
    BatchPlan(plan.batches, plan.stats, gallery).save(uri, pairs)
    query_ids, reference_ids = load_plan(uri)
    assert np.array_equal(query_ids, pairs.query_ids[plan.batches])
    assert np.array_equal(reference_ids, pairs.reference_ids[plan.batches])
    assert np.array_equal(load_gallery(uri), gallery)
    extra = pq.read_table(uri).filter(pc.field("slot") >= 4).to_pylist()
    assert extra[1] == {"batch": 0, "slot": 6, "query_id": None, "reference_id": 8}
    assert len(extra) == 8


def test_the_pairs_of_a_plan_are_read_without_its_gallery_and_the_gallery_without_the_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.tables.batch_plan.ROWS_PER_GROUP", 8)
    pairs = make_pairs(list(range(20)))
    plan = plan_batches(pairs, None, batch_size=4, seed=0, epoch=0)
    gallery = np.arange(15).reshape(5, 3)
    uri = tmp_path / "plan.parquet"
    damaged = tmp_path / "damaged.parquet"
    BatchPlan(plan.batches, plan.stats, gallery).save(str(uri), pairs)
    data = uri.read_bytes()
    groups = pq.ParquetFile(uri).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [8, 8, 4, 15]
    last = [groups.row_group(3).column(i) for i in range(4)]
    start = last[0].dictionary_page_offset
    end = start + sum(column.total_compressed_size for column in last)
    damaged.write_bytes(bytes(start) + data[start:])
    assert np.array_equal(load_gallery(str(damaged)), gallery)
    damaged.write_bytes(data[:start] + bytes(end - start) + data[end:])
    assert np.array_equal(load_plan(str(damaged))[0], pairs.query_ids[plan.batches])


@pytest.mark.parametrize("gallery", [None, np.zeros((5, 0), dtype=np.int64)])
def test_a_plan_without_a_gallery_has_one_of_no_columns(tmp_path: Path, gallery: Any) -> None:
    pairs = make_pairs(list(range(20)))
    plan = plan_batches(pairs, None, batch_size=4, seed=0, epoch=0)
    BatchPlan(plan.batches, plan.stats, gallery).save(str(tmp_path / "plan.parquet"), pairs)
    assert load_gallery(str(tmp_path / "plan.parquet")).shape == (5, 0)


def test_an_empty_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    pairs = make_pairs([1, 1, 1])
    plan_batches(pairs, None, batch_size=2, seed=0, epoch=0).save(
        str(tmp_path / "plan.parquet"), pairs
    )
    assert load_plan(str(tmp_path / "plan.parquet"))[0].shape == (0, 2)
