from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from s4g_ray.errors import RunError
from s4g_ray.neighbors import (
    EARTH_RADIUS_M,
    NeighborGraph,
    PlacePairs,
    geographic_graph,
    geographic_neighbors,
    places_within,
)
from s4g_ray.storage import Stamp

Floats = NDArray[np.float64]


def haversine_loop(lat: Floats, lon: Floats) -> Floats:
    """metres[N, N] by the textbook formula, one pair at a time."""
    metres = np.zeros((len(lat), len(lat)))
    for i in range(len(lat)):
        for j in range(len(lat)):
            p, q = np.radians(lat[i]), np.radians(lat[j])
            dl = np.radians(lon[j] - lon[i])
            a = np.sin((q - p) / 2) ** 2 + np.cos(p) * np.cos(q) * np.sin(dl / 2) ** 2
            metres[i, j] = 2 * EARTH_RADIUS_M * np.arctan2(np.sqrt(a), np.sqrt(max(0.0, 1 - a)))
    return metres


KINDS = ["globe", "poles", "antimeridian", "duplicates", "metres apart"]


def points(kind: str) -> tuple[Floats, Floats]:
    assert kind in KINDS
    rng = np.random.default_rng(11)
    lat, lon = np.degrees(np.arcsin(rng.uniform(-1, 1, 60))), rng.uniform(-180, 180, 60)
    if kind == "poles":
        lat = np.concatenate([np.full(10, 90.0), np.full(10, -90.0), rng.uniform(88, 90, 40)])
    elif kind == "antimeridian":
        lat, lon = (
            rng.uniform(-1, 1, 60),
            np.where(rng.random(60) < 0.5, 179.99, -179.99) + rng.uniform(-0.01, 0.01, 60),
        )
    elif kind == "duplicates":
        lat, lon = np.repeat(lat[:6], 10), np.repeat(lon[:6], 10)
    elif kind == "metres apart":
        lat, lon = 51.5 + rng.uniform(0, 1e-4, 60), rng.uniform(0, 1e-4, 60)
    return lat, lon


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, 59])
def test_geographic_neighbors_equal_brute_force_haversine(kind: str, k: int) -> None:
    lat, lon = points(kind)
    indices, metres = geographic_neighbors(lat, lon, k)
    exact = haversine_loop(lat, lon)
    for i in range(len(lat)):
        others = np.delete(exact[i], i)
        assert np.allclose(metres[i], np.sort(others)[:k], rtol=1e-9, atol=1e-3)
        assert np.allclose(exact[i, indices[i]], metres[i], rtol=1e-9, atol=1e-3)
        assert i not in indices[i]
        assert len(set(indices[i].tolist())) == k


@pytest.mark.parametrize("k", [0, 60])
def test_more_neighbors_than_places_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} is not within 1\.\.59"):
        geographic_neighbors(*points("globe"), k)
    with pytest.raises(ValueError, match="not finite"):
        geographic_neighbors(np.array([0.0, np.nan, 1.0]), np.zeros(3), 1)


def test_a_graph_survives_saving_with_its_pads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s4g_ray.neighbors.ROWS_PER_PART", 2)
    stamp = Stamp(step=1, weights_sha256="a", preprocessing="p", dataset="d", dim=4, dtype="float32")
    neighbors = np.array([[7, 9, -1], [-1, -1, -1], [3, 7, 5]])
    scores = np.array([[0.9, 0.1, -np.inf], [-np.inf] * 3, [3, 2, 1]], dtype=np.float32)
    NeighborGraph(np.array([5, 7, 9]), neighbors, scores).save(str(tmp_path / "g"), stamp=stamp)
    graph = NeighborGraph.load(str(tmp_path / "g"), stamp=stamp)
    assert np.array_equal(graph.neighbors, neighbors)
    assert graph.scores is not None
    assert np.array_equal(graph.scores, scores)
    assert len(list((tmp_path / "g").glob("*.parquet"))) == 2
    other = Stamp(step=2, weights_sha256="a", preprocessing="p", dataset="d", dim=4, dtype="float32")
    with pytest.raises(RunError, match="step 1, but 2 is wanted"):
        NeighborGraph.load(str(tmp_path / "g"), stamp=other)


def test_impossible_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match="its own neighbors"):
        NeighborGraph(np.array([1, 2]), np.array([[2], [2]]))
    with pytest.raises(ValueError, match="repeats a place"):
        NeighborGraph(np.array([1, 1]), np.array([[2], [3]]))
    with pytest.raises(ValueError, match="shape"):
        NeighborGraph(np.array([1, 2]), np.array([[2]]))


def test_a_geographic_graph_speaks_of_place_ids() -> None:
    graph = geographic_graph(np.array([40, 10, 30]), np.array([0.0, 1.0, 3.0]), np.zeros(3), 2)
    assert graph.neighbors.tolist() == [[10, 30], [40, 30], [10, 40]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_places_within_a_radius_equal_a_plain_loop(kind: str, share: float) -> None:
    lat, lon = points(kind)
    metres = haversine_loop(lat, lon)
    radius = float(np.quantile(metres[metres > 0], share)) * (1 + 1e-6)  # not on a pair's own distance
    ids = np.arange(len(lat)) * 7 + 3
    found = places_within(ids, lat, lon, radius)
    wanted = {(ids[i], ids[j]) for i in range(len(lat)) for j in range(len(lat)) if i != j and metres[i, j] <= radius}
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == wanted
    assert found.most == max(sum(a == i for a, _ in wanted) for i in ids)


def test_a_set_of_pairs_is_symmetric_and_becomes_a_graph() -> None:
    pairs = PlacePairs.of(np.array([5, 5, 9, 5]), np.array([9, 2, 5, 5]))
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [(2, 5), (5, 2), (5, 9), (9, 5)]
    first, second = np.array([[5, 5], [9, 7]]), np.array([[2, -1], [5, 5]])
    assert pairs.contains(first, second).tolist() == [[True, False], [True, False]]
    graph = pairs.graph()
    assert graph.place_ids.tolist() == [2, 5, 9]
    assert graph.neighbors.tolist() == [[5, -1], [2, 9], [5, -1]]
    empty = PlacePairs.of(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert (len(empty), empty.most) == (0, 0)
    assert not empty.contains(first, second).any()


def test_excluded_places_are_passed_over_for_the_next_nearest() -> None:
    lat, lon = points("metres apart")
    ids, k = np.arange(len(lat)) + 100, 4
    metres = haversine_loop(lat, lon)
    nearest = np.argsort(np.where(np.eye(len(lat), dtype=bool), np.inf, metres), axis=1, kind="stable")
    barred = PlacePairs.of(ids, ids[nearest[:, 0]])  # each place and its nearest
    graph = geographic_graph(ids, lat, lon, k, barred)
    taboo = set(zip(barred.first.tolist(), barred.second.tolist(), strict=True))
    for row in range(len(lat)):
        order = [int(ids[j]) for j in nearest[row] if j != row and (ids[row], ids[j]) not in taboo]
        assert graph.neighbors[row].tolist() == order[:k]
