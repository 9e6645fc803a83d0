from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.data.tables.neighbor_graph import NeighborGraph, publish_graph, write_graph_part
from s4g_ray.errors import RunError
from s4g_ray.sampling.compact_graph import CompactGraph, IdLookup

ids = st.one_of(st.integers(-20, 60), st.integers(-(2**63), 2**63 - 1))


@settings(max_examples=200, deadline=None)
@given(st.lists(ids, unique=True, max_size=60), st.lists(ids, max_size=30))
def test_a_lookup_finds_the_row_of_each_place_and_of_no_other_id(
    places: list[int], others: list[int]
) -> None:
    known = np.array(sorted(places), dtype=np.int64)
    rows = {place: row for row, place in enumerate(known.tolist())}
    wanted = np.array([*places, *others], dtype=np.int64)
    assert IdLookup.from_ids(known).rows(wanted).tolist() == [
        rows.get(i, -1) for i in wanted.tolist()
    ]


def test_dense_ids_take_a_table_of_their_range_and_scattered_ones_a_hash_table() -> None:
    dense = np.arange(7, 3007, 3)
    scattered = np.arange(7, 10**12, 10**9)
    assert IdLookup.from_ids(dense).shift == 0
    assert IdLookup.from_ids(scattered).shift > 0
    assert len(IdLookup.from_ids(scattered).table) <= 8 * len(scattered)


@pytest.mark.parametrize("places", [[3, 3], [4, 3]])
def test_places_that_do_not_ascend_are_refused(places: list[int]) -> None:
    with pytest.raises(ValueError, match="not ascending or repeat one"):
        IdLookup.from_ids(np.array(places))


def random_graph(count: int, k: int, seed: int) -> NeighborGraph:
    """Return places in any order with up to k neighbors; ids are far apart for odd seeds."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(np.arange(count) * (10**15 if seed % 2 else 2) + 11)
    neighbors = np.full((count, k), -1, dtype=np.int64)
    for row, place in enumerate(places):
        others = rng.permutation(places[places != place])[: rng.integers(0, k + 1)]
        neighbors[row, : len(others)] = others
    return NeighborGraph(places, neighbors, rng.random((count, k), dtype=np.float32))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 25), st.integers(1, 8), st.integers(1, 10), st.integers(0, 2**32), st.booleans()
)
def test_rows_are_the_nearest_known_neighbors_in_their_order(
    count: int, k: int, width: int, seed: int, of_others: bool
) -> None:
    graph = random_graph(count, k, seed)
    rng = np.random.default_rng(seed)
    places = np.unique(
        np.concatenate([graph.place_ids[rng.random(count) < 0.7], rng.integers(0, 9, 2)])
    )
    among = np.sort(graph.place_ids[rng.random(count) < 0.7]) if of_others else places
    rows = CompactGraph.from_graph(graph, places, width, among=among if of_others else None)
    assert rows.rows.dtype == np.int32
    assert rows.rows.shape == (len(places), min(width, k))
    neighbors = dict(zip(graph.place_ids.tolist(), graph.neighbors.tolist(), strict=True))
    for place, row in zip(places.tolist(), rows.rows.tolist(), strict=True):
        known = [n for n in neighbors.get(place, []) if n in among][: min(width, k)]
        assert [among[r] for r in row if r >= 0] == known
        assert row[len(known) :] == [-1] * (min(width, k) - len(known))


def test_rows_read_part_by_part_are_those_of_the_whole_graph(tmp_path: Path) -> None:
    graph = random_graph(100, 6, 3)
    uri = str(tmp_path / "graph")
    cuts = (0, 40, 41, 100)
    parts = [write_graph_part(uri, i, graph.take(slice(cuts[i], cuts[i + 1]))) for i in range(3)]
    publish_graph(uri, parts, 6)
    places = np.sort(graph.place_ids)[::2]
    assert np.array_equal(
        CompactGraph.read(uri, places, 4).rows, CompactGraph.from_graph(graph, places, 4).rows
    )
    others = np.sort(graph.place_ids)[1::3]
    read = CompactGraph.read(uri, places, 4, among=others)
    assert np.array_equal(read.rows, CompactGraph.from_graph(graph, places, 4, among=others).rows)


def test_a_graph_without_neighbors_or_places_is_read(tmp_path: Path) -> None:
    empty: Any = NeighborGraph(np.zeros(0, dtype=np.int64), np.zeros((0, 3), dtype=np.int64))
    empty.save(str(tmp_path / "graph"))
    assert (
        CompactGraph.read(str(tmp_path / "graph"), np.arange(4), 8).rows.tolist() == [[-1] * 3] * 4
    )


def test_a_part_that_was_altered_is_refused(tmp_path: Path) -> None:
    random_graph(20, 3, 0).save(str(tmp_path / "graph"))
    file = tmp_path / "graph" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match="cut short or altered"):
        CompactGraph.read(str(tmp_path / "graph"), np.arange(4), 8)
