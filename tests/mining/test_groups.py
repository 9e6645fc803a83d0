"""Groups, counts and keys of a mining job, and the inputs that it refuses at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.places import Places
from s4g_ray.data.tables.embedding_table import encode_part
from s4g_ray.data.tables.neighbor_graph import NeighborGraph, write_graph_part
from s4g_ray.errors import InputError, RunError
from s4g_ray.mining.candidates import Kept, References
from s4g_ray.mining.groups import compute_job_key, places_per_part, plan_groups
from s4g_ray.mining.job_plan import MiningPlan
from s4g_ray.mining.mining_job import mine
from s4g_ray.mining.report import Counts, MiningReport
from s4g_ray.storage.manifest import open_published, publish, write_part
from tests.support.mining_tables import STAMP, write_queries


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_groups_hold_every_part_with_places_once_in_order_and_are_as_large_as_wanted(
    counts: list[int], wanted: int
) -> None:
    groups = plan_groups(counts, wanted)
    assert [part for group in groups for part in group] == [
        i for i, count in enumerate(counts) if count
    ]
    sizes = [sum(counts[part] for part in group) for group in groups]
    assert all(size >= wanted for size in sizes[:-1])
    assert all(sum(counts[part] for part in group[:-1]) < wanted for group in groups)


@pytest.mark.parametrize("num_places", [2_000, 20_000])
def test_a_part_of_the_planned_places_has_the_wanted_size(tmp_path: Path, num_places: int) -> None:
    k = 32
    rng = np.random.default_rng(0)
    count = places_per_part(1.0, k)
    places = np.arange(count)
    neighbors = rng.integers(count, count + num_places, (count, k))  # fewer bits than most tables
    scores = -np.sort(-rng.random((count, k), dtype=np.float32), axis=1)
    part = write_graph_part(str(tmp_path), 0, NeighborGraph(places, neighbors, scores))
    assert 1e6 <= part.num_bytes < 2e6


def test_counts_of_queries_and_graphs_add_up_to_the_report() -> None:
    kept = Kept.unfilled(4, 3)
    kept.num[:] = [3, 3, 1, 0]
    kept.above[:] = [3, 1, 0, 0]
    kept.own_rank[:] = [7, 1, 4, 0]
    kept.dropped[:, 0] = 1
    kept.dropped[0, 5] = 2
    graph = NeighborGraph(np.array([1, 2]), np.array([[2, 3, 4], [1, -1, -1]]))
    counts = Counts.from_queries(kept) + Counts.from_graph(graph, 2, 1)
    report = MiningReport.from_counts(
        counts, 3, has_previous=True, without_embedding=1, seconds=2.0, reused_parts=5
    )
    assert report.metrics() == {
        "places": 2,
        "queries": 4,
        "neighbors": 4,
        "coverage": 4 / 6,
        "short": 1,
        "above_positive": 4 / 7,
        "overlap": 1 / 2,
        "train_recall@1": 1 / 4,
        "train_recall@5": 2 / 4,
        "train_recall@10": 3 / 4,
        "dropped_own": 4,
        "dropped_semi_positive": 0,
        "dropped_near": 0,
        "dropped_max_score": 0,
        "dropped_relative_margin": 0,
        "dropped_range_min": 2,
        "without_embedding": 1,
        "seconds": 2.0,
        "reused_parts": 5,
        "carried": 0,
    }
    first = MiningReport.from_counts(
        counts, 3, has_previous=False, without_embedding=0, seconds=1.0, reused_parts=0
    )
    assert first.overlap is None
    assert "overlap" not in first.metrics()


def test_the_key_of_a_job_depends_on_all_that_determines_its_parts() -> None:
    ids = np.arange(6)
    places = ids + 50
    located = Places(places, np.arange(6.0), np.zeros(6))
    exclusions = Exclusions(located, PlacePairs.from_arrays(np.array([50]), np.array([51])), 10.0)
    moved = replace(located, lat=located.lat + 1)
    other_pair = PlacePairs.from_arrays(np.array([50]), np.array([52]))
    keys = [
        compute_job_key({"k": 3}, ids, References(ids, places), exclusions),
        compute_job_key({"k": 4}, ids, References(ids, places), exclusions),
        compute_job_key({"k": 3}, ids[1:], References(ids, places), exclusions),
        compute_job_key({"k": 3}, ids, References(ids + 1, places), exclusions),
        compute_job_key({"k": 3}, ids, References(ids, places[::-1]), exclusions),
        compute_job_key({"k": 3}, ids, References(ids, places), None),
        compute_job_key({"k": 3}, ids, References(ids, places), replace(exclusions, radius_m=11.0)),
        compute_job_key({"k": 3}, ids, References(ids, places), replace(exclusions, places=moved)),
        compute_job_key(
            {"k": 3}, ids, References(ids, places), replace(exclusions, semi_positives=other_pair)
        ),
        compute_job_key({"k": 3}, ids, References(ids, places), None, located),
        compute_job_key({"k": 3}, ids, References(ids, places), None, moved),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == compute_job_key({"k": 3}, ids.copy(), References(ids, places), exclusions)


class RefusingIndex:
    """An index that must not be asked."""

    def search(self, version: int, queries: NDArray[np.float32], k: int) -> Any:
        raise AssertionError("the index was asked")


Change = Callable[[str], dict[str, Any]]
REFUSALS: list[tuple[str, type[Exception], Change]] = [
    (r"k=7 neighbors .* 6 places", InputError, lambda _: {"k": 7}),
    (r"k=0 neighbors", InputError, lambda _: {"k": 0}),
    ("query id 3 appears twice", InputError, lambda _: {"query_ids": np.array([1, 3, 3])}),
    ("query id 1 is not in ascending order", InputError, lambda _: {"query_ids": np.array([3, 1])}),
    ("there are no query ids", InputError, lambda _: {"query_ids": np.zeros(0, np.int64)}),
    ("6 references have 5 places", InputError, lambda _: {"reference_places": np.arange(5)}),
    (
        "references without a place: 1, the first id 0; leave them out",
        InputError,
        lambda _: {"reference_places": np.array([-1, 1, 2, 3, 4, 5])},
    ),
    (
        r"3 of 5 queries have no embedding in .* \(bad images left out there: 1\);"
        r" the first is query id 20",
        RunError,
        lambda _: {"query_ids": np.array([0, 1, 20, 21, 22])},
    ),
    ("made with step 4, but 5 is wanted", RunError, lambda _: {"stamp": replace(STAMP, step=5)}),
    ("holds no published neighbors", RunError, lambda folder: {"previous": folder + "/nothing"}),
    ("holds no published neighbors", RunError, lambda folder: {"carry_from": folder + "/nothing"}),
    ("holds no published embeddings", RunError, lambda folder: {"embeddings": folder + "/nothing"}),
]


@pytest.mark.parametrize(
    ("message", "error", "change"), REFUSALS, ids=[message[:30] for message, _, _ in REFUSALS]
)
def test_impossible_input_is_refused_before_the_index_is_asked(
    tmp_path: Path, message: str, error: type[Exception], change: Change
) -> None:
    write_queries(
        str(tmp_path / "e"),
        np.arange(6),
        np.arange(6),
        np.eye(6, dtype=np.float32),
        4,
        bad_images=1,
    )
    arguments: dict[str, Any] = {
        "embeddings": str(tmp_path / "e"),
        "query_ids": np.arange(6),
        "reference_ids": np.arange(6),
        "reference_places": np.arange(6),
        "k": 2,
        "exclusions": None,
        "stamp": STAMP,
        "cfg": MiningConfig(),
        **change(str(tmp_path)),
    }
    with pytest.raises(error, match=message):
        mine(RefusingIndex(), 4, target=str(tmp_path / "g"), **arguments)


@pytest.mark.parametrize("places", [[0, 1, 4, 3, 5, 6], [0, 1, 2, 2, 3, 4]])
def test_a_table_whose_parts_are_not_in_the_order_of_places_is_refused_with_the_remedy(
    tmp_path: Path, places: list[int]
) -> None:
    folder = str(tmp_path)
    vectors = np.eye(6, dtype=np.float32)
    write_queries(folder, np.arange(6), np.arange(6), vectors, 3)  # two parts
    stored = open_published(folder, "embeddings")
    parts = []
    for rows, part in zip((slice(0, 3), slice(3, 6)), stored.parts, strict=True):
        data = encode_part(np.arange(6)[rows], np.array(places)[rows], vectors[rows], "float32")
        parts.append(write_part(folder, part.name, data, 3))
    publish(folder, "embeddings", parts, STAMP, {})
    message = (
        rf"part-00001\.parquet holds place {places[3]}, a part before it place {places[2]}: .*"
    )
    with pytest.raises(RunError, match=message + r" .*remove .* and embed again"):
        MiningPlan.from_embeddings(folder, np.arange(6), MiningConfig(), 2, STAMP)
    # places of queries that are not mined may lie anywhere
    plan = MiningPlan.from_embeddings(folder, np.array([0, 1, 5]), MiningConfig(), 2, STAMP)
    assert plan.places.tolist() == [0, 1, places[5]]


def test_a_damaged_part_or_a_repeated_query_in_the_table_is_named(tmp_path: Path) -> None:
    def run() -> None:
        mine(
            RefusingIndex(),
            4,
            str(tmp_path),
            str(tmp_path / "g"),
            cfg=MiningConfig(),
            k=2,
            query_ids=np.arange(6),
            reference_ids=np.arange(6),
            reference_places=np.arange(6),
            exclusions=None,
            stamp=STAMP,
        )

    ids = np.array([0, 1, 2, 3, 4, 4])
    write_queries(str(tmp_path), ids, ids, np.eye(6, dtype=np.float32), 4, bad_images=1)
    with pytest.raises(RunError, match="holds query id 4 twice"):
        run()
    part = tmp_path / "queries" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(
        RunError, match=r"part-00001\.parquet differs from the published file.* remove"
    ):
        run()
    part.unlink()
    with pytest.raises(
        RunError, match=r"part-00001\.parquet is in the manifest but missing; remove"
    ):
        run()
