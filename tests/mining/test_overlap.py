from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from s4g_ray.data.tables.neighbor_graph import (
    NeighborGraph,
    choose_rows,
    publish_graph,
    read_graph_rows,
    write_graph_part,
)
from s4g_ray.errors import RunError
from s4g_ray.mining.overlap import SampledRows, sample_places


def random_graph(places: list[int], k: int, seed: int) -> NeighborGraph:
    """Return a graph with up to k of 40 places in each row; rows may be empty."""
    rng = np.random.default_rng(seed)
    neighbors = np.full((len(places), k), -1)
    scores = np.full((len(places), k), -np.inf, np.float32)
    for row, place in enumerate(places):
        count = rng.integers(k + 1)
        neighbors[row, :count] = rng.permutation(np.delete(np.arange(40), place))[:count]
        scores[row, :count] = np.sort(rng.random(count))[::-1]
    return NeighborGraph(np.array(places), neighbors, scores)


def test_rows_within_a_range_of_places_are_read_as_they_were_written(tmp_path: Path) -> None:
    graph = random_graph([2, 3, 5, 8, 13, 21], 4, 0)
    name = write_graph_part(str(tmp_path), 0, graph).name
    for low, high, rows in [
        (3, 8, slice(1, 4)),
        (0, 99, slice(None)),
        (6, 7, slice(0, 0)),
        (21, 21, slice(5, 6)),
    ]:
        places, neighbors, scores = read_graph_rows(str(tmp_path / name), low, high, 4)
        assert places.tolist() == graph.place_ids[rows].tolist()
        assert neighbors.tolist() == graph.neighbors[rows].tolist()
        assert graph.scores is not None
        assert scores.tolist() == graph.scores[rows].tolist()
    with pytest.raises(RunError, match=r"part-7\.parquet cannot be read"):
        read_graph_rows(str(tmp_path / "part-7.parquet"), 0, 9, 4)


def test_row_groups_without_places_of_the_range_are_not_decoded(tmp_path: Path) -> None:
    graph = random_graph(list(range(40)), 4, 0)
    path = tmp_path / write_graph_part(str(tmp_path), 0, graph, row_group_size=10).name
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    length = column.total_compressed_size
    data[start : start + length] = bytes(length)
    path.write_bytes(data)
    assert read_graph_rows(str(path), 10, 39, 4)[1].tolist() == graph.neighbors[10:].tolist()
    with pytest.raises(RunError, match=r"part-00000\.parquet cannot be read"):
        read_graph_rows(str(path), 9, 39, 4)


def count_overlap(new: NeighborGraph, old: NeighborGraph, places: Iterable[int]) -> tuple[int, int]:
    """Count the neighbors of places, and those that a place has in the old graph too, with sets."""
    rows = {
        int(p): set(row.tolist()) - {-1}
        for p, row in zip(old.place_ids, old.neighbors, strict=True)
    }
    ours = {
        int(p): set(row.tolist()) - {-1}
        for p, row in zip(new.place_ids, new.neighbors, strict=True)
    }
    chosen = [place for place in places if place in ours]
    num_neighbors = sum(len(ours[p]) for p in chosen)
    num_shared = sum(len(ours[p] & rows.get(p, set())) for p in chosen)
    return num_neighbors, num_shared


def test_neighbors_shared_with_a_published_graph_equal_a_count_with_sets_for_any_cut(
    tmp_path: Path,
) -> None:
    old = random_graph([7, 3, 30, 5, 9, 22, 1], 6, 1)
    parts = [
        write_graph_part(str(tmp_path), n, old.take(slice(3 * n, 3 * n + 3))) for n in range(3)
    ]
    publish_graph(str(tmp_path), parts, 6)
    everything = np.array([3, 4, 5, 9, 22])
    found_any = False
    for chosen in (everything, everything[1:4]):
        sample = SampledRows.read(str(tmp_path), chosen)
        for seed in range(5):
            new = random_graph([22, 4, 5, 9, 3], 8, seed)
            wanted = count_overlap(new, old, chosen.tolist())
            found_any |= wanted[1] > 0
            assert sample.compare(new) == wanted
            halves = [sample.compare(new.take(rows)) for rows in (slice(0, 2), slice(2, 5))]
            assert tuple(np.sum(halves, axis=0)) == wanted
    assert found_any


def test_all_places_are_sampled_or_as_many_as_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.arange(30) * 2
    assert sample_places(places).tolist() == places.tolist()
    monkeypatch.setattr("s4g_ray.mining.overlap.SAMPLED_PLACES", 10)
    chosen = sample_places(places)
    assert (chosen // 6).tolist() == list(range(10))  # one of each three
    assert np.isin(chosen, places).all()
    assert sample_places(places).tolist() == chosen.tolist()


def test_chosen_rows_are_a_graph_of_their_own() -> None:
    graph = random_graph([2, 3, 5], 4, 0)
    chosen = choose_rows(graph, np.array([True, False, True]))
    assert chosen.place_ids.tolist() == [2, 5]
    assert chosen.neighbors.tolist() == graph.neighbors[[0, 2]].tolist()
