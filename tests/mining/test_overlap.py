from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.tables.neighbor_graph import (
    NeighborGraph,
    choose_rows,
    publish_graph,
    read_graph_places,
    read_graph_samples,
    write_graph_part,
)
from s4g_ray.errors import RunError
from s4g_ray.mining.overlap import SampledRows


def random_graph(places: list[int], k: int, seed: int) -> NeighborGraph:
    """Return a graph with up to k of 40 places in each row; rows may be empty."""
    rng = np.random.default_rng(seed)
    neighbors = np.full((len(places), k), -1)
    scores = np.full((len(places), k), -np.inf, np.float32)
    for row, place in enumerate(places):
        count = rng.integers(k + 1)
        neighbors[row, :count] = rng.permutation(np.setdiff1d(np.arange(40), [place]))[:count]
        scores[row, :count] = np.sort(rng.random(count))[::-1]
    return NeighborGraph(np.array(places), neighbors, scores)


def test_row_groups_are_read_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.tables.neighbor_graph.PAIRS_PER_ROW_GROUP", 40)
    graph = random_graph(list(range(40)), 4, 0)
    part = write_graph_part(str(tmp_path), 0, graph)
    groups = read_graph_samples(str(tmp_path), part)
    assert [group.places.tolist() for group in groups] == np.arange(40).reshape(4, 10).tolist()
    filled = graph.neighbors[graph.neighbors >= 0]
    assert np.concatenate([group.ids for group in groups]).tolist() == filled.tolist()
    chosen = read_graph_samples(str(tmp_path), part, 2, np.random.default_rng(1))
    assert len(chosen) == 2
    assert next(iter(read_graph_places(str(tmp_path), [part]))).tolist() == list(range(40))
    path = tmp_path / part.name
    path.write_bytes(path.read_bytes()[:-9])
    for read in (read_graph_samples, lambda uri, part: list(read_graph_places(uri, [part]))):
        with pytest.raises(RunError, match=r"part-00000\.parquet differs from the published file"):
            read(str(tmp_path), part)


def count_overlap(new: NeighborGraph, old: NeighborGraph) -> tuple[int, int]:
    """Count the neighbors of places, and those that a place has in the old graph too, with sets."""
    rows = {
        int(p): set(row.tolist()) - {-1}
        for p, row in zip(old.place_ids, old.neighbors, strict=True)
    }
    ours = {
        int(p): set(row.tolist()) - {-1}
        for p, row in zip(new.place_ids, new.neighbors, strict=True)
    }
    num_neighbors = sum(len(found) for found in ours.values())
    num_shared = sum(len(found & rows[place]) for place, found in ours.items())
    return num_neighbors, num_shared


def test_neighbors_shared_with_a_published_graph_equal_a_count_with_sets_for_any_cut(
    tmp_path: Path,
) -> None:
    old = random_graph([7, 3, 30, 5, 9, 22, 1], 6, 1)
    parts = [
        write_graph_part(str(tmp_path), n, old.take(slice(3 * n, 3 * n + 3))) for n in range(3)
    ]
    publish_graph(str(tmp_path), parts, 6)
    found_any = False
    sample = SampledRows.read(str(tmp_path))
    assert sample.places.tolist() == [1, 3, 5, 7, 9, 22, 30]
    for seed in range(5):
        new = random_graph([22, 5, 9, 3], 8, seed)
        wanted = count_overlap(new, old)
        found_any |= wanted[1] > 0
        assert sample.compare(new) == wanted
        halves = [sample.compare(new.take(rows)) for rows in (slice(0, 2), slice(2, 4))]
        assert tuple(np.sum(halves, axis=0)) == wanted
    assert found_any
    assert sample.compare(random_graph([4, 6], 8, 0)) == (0, 0)  # the old graph lacks them


def test_a_large_graph_is_sampled_from_a_few_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.tables.neighbor_graph.PAIRS_PER_ROW_GROUP", 40)
    monkeypatch.setattr("s4g_ray.mining.overlap.SAMPLED_PLACES", 24)
    monkeypatch.setattr("s4g_ray.mining.overlap.SAMPLED_GROUPS", 6)
    graph = random_graph(list(range(400)), 4, 1)
    parts = [write_graph_part(str(tmp_path), n, graph.take(slice(n, n + 100))) for n in (0, 200)]
    lost = write_graph_part(str(tmp_path), 5, graph.take(slice(100, 101)))
    publish_graph(str(tmp_path), [*parts, lost], 4)
    (tmp_path / lost.name).unlink()  # a part that is not drawn is not opened
    sample = SampledRows.read(str(tmp_path))
    assert 20 <= len(sample.places) <= 28
    assert len(np.unique(sample.places // 10)) <= 6
    assert sample.neighbors.tolist() == graph.neighbors[sample.places].tolist()
    assert SampledRows.read(str(tmp_path)).places.tolist() == sample.places.tolist()


def test_chosen_rows_are_a_graph_of_their_own() -> None:
    graph = random_graph([2, 3, 5], 4, 0)
    chosen = choose_rows(graph, np.array([True, False, True]))
    assert chosen.place_ids.tolist() == [2, 5]
    assert chosen.neighbors.tolist() == graph.neighbors[[0, 2]].tolist()
