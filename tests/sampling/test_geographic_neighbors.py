from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import unit_sphere
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.sampling.geographic_neighbors import (
    geographic_blocks,
    geographic_graph,
    geographic_neighbors,
    nearest_places,
    write_geographic_graph,
    write_nearest_places,
)
from s4g_ray.sampling.place_tree import curve_order
from tests.support.sphere_oracle import haversine_loop, points

KINDS = ["globe", "poles", "antimeridian", "duplicates", "metres apart"]


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


def make_places(kind: str) -> Places:
    lat, lon = points(kind)
    return Places(np.arange(len(lat)) * 7 + 3, lat, lon)


NO_PAIRS = PlacePairs.from_arrays(np.zeros(0, np.int64), np.zeros(0, np.int64))


def make_exclusions(kind: str, share: float) -> Exclusions:
    """Exclude a share of all pairs by the radius, and each ninth place from the next by name.

    The radius is not the distance of any pair.
    """
    known = make_places(kind)
    metres = haversine_loop(known.lat, known.lon)
    radius = float(np.quantile(metres[metres > 0], share)) * (1 + 1e-6)
    return Exclusions(known, PlacePairs.from_arrays(known.ids[:-1:9], known.ids[1::9]), radius)


def assert_nearest_kept(
    graph: NeighborGraph, asking: Places, found: Places, k: int, exclusions: Exclusions | None
) -> None:
    """Compare with a loop: rows hold the nearest of `found`, without itself and excluded places."""
    semi = set()
    if exclusions is not None:
        semi = set(
            zip(exclusions.semi_positives.first, exclusions.semi_positives.second, strict=True)
        )
    metres = haversine_loop(np.append(asking.lat, found.lat), np.append(asking.lon, found.lon))
    assert graph.scores is not None
    for row, own in enumerate(graph.place_ids):
        i = int(np.flatnonzero(asking.ids == own)[0])
        kept = {}
        for j, other in enumerate(found.ids):
            distance = metres[i, len(asking) + j]
            is_near = exclusions is not None and distance <= exclusions.radius_m
            if other != own and (own, other) not in semi and not is_near:
                kept[other] = distance
        nearest = sorted(kept.values())[:k]
        count = len(nearest)
        assert (graph.neighbors[row, count:] == -1).all()
        assert (graph.scores[row, count:] == -np.inf).all()
        assert len(set(graph.neighbors[row, :count])) == count
        assert -graph.scores[row, :count] == pytest.approx(nearest, rel=1e-6, abs=1e-3)
        assert [kept[other] for other in graph.neighbors[row, :count]] == pytest.approx(
            nearest, rel=1e-9, abs=1e-3
        )


def test_a_geographic_graph_holds_place_ids() -> None:
    graph = geographic_graph(
        Places(np.array([10, 30, 40]), np.array([1.0, 3.0, 0.0]), np.zeros(3)), 2
    )
    assert graph.place_ids.tolist() == [10, 30, 40]
    assert graph.neighbors.tolist() == [[40, 30], [10, 40], [10, 30]]


def test_places_of_unknown_position_are_refused_in_a_geographic_graph() -> None:
    with pytest.raises(ValueError, match="1 places have a coordinate that is not finite"):
        geographic_graph(Places(np.arange(3), np.array([0.0, np.nan, 1.0]), np.zeros(3)), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_excluded_places_are_skipped_for_the_next_nearest(
    kind: str, k: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.tables.neighbor_graph.PAIRS_PER_BLOCK", 333)
    monkeypatch.setattr("s4g_ray.sampling.place_tree.PAIRS_AT_ONCE", 217)
    exclusions = make_exclusions(kind, share)
    graph = geographic_graph(exclusions.places, k, exclusions)
    assert_nearest_kept(graph, exclusions.places, exclusions.places, k, exclusions)


def test_exclusions_use_their_own_coordinates_where_these_differ() -> None:
    """The exclusions hold half of the places, some of them elsewhere, and lack the other half."""
    asking = make_places("metres apart")
    rng = np.random.default_rng(1)
    known = Places(asking.ids[::2], asking.lat[::2] + rng.integers(0, 2, 30), asking.lon[::2])
    exclusions = Exclusions(known, NO_PAIRS, 5.0)
    graph = geographic_graph(asking, 58, exclusions)
    for row, own in enumerate(asking.ids):
        wanted = {
            other
            for other in asking.ids
            if other != own and not exclusions.contains(np.array(own), np.array(other))
        }
        found = set(graph.neighbors[row][graph.neighbors[row] >= 0].tolist())
        assert found <= wanted
        assert len(found) == min(58, len(wanted))


@pytest.mark.parametrize("block", [1, 7, 59, 60, 1000])
@pytest.mark.parametrize("has_exclusions", [False, True])
def test_blocks_of_any_size_make_up_the_whole_graph(block: int, has_exclusions: bool) -> None:
    exclusions = make_exclusions("globe", 0.1) if has_exclusions else None
    known = exclusions.places if exclusions else make_places("globe")
    whole = geographic_graph(known, 9, exclusions)
    parts = list(geographic_blocks(known, 9, exclusions, block=block))
    assert [len(part.place_ids) for part in parts][:-1] == [block] * (len(parts) - 1)
    rows = known.rows(np.concatenate([part.place_ids for part in parts]))
    assert sorted(rows) == list(range(60))
    assert np.array_equal(whole.neighbors[rows], np.concatenate([part.neighbors for part in parts]))
    assert whole.scores is not None
    assert np.array_equal(
        whole.scores[rows],
        np.concatenate([part.scores for part in parts if part.scores is not None]),
    )


def test_a_streamed_graph_equals_the_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.tables.neighbor_graph.PAIRS_PER_BLOCK", 130)
    exclusions = make_exclusions("metres apart", 0.1)
    seen: list[tuple[int, int]] = []
    uri = str(tmp_path / "g")
    manifest = write_geographic_graph(
        uri,
        exclusions.places,
        12,
        exclusions,
        info={"reason": "test"},
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert len(manifest.parts) > 2
    assert (manifest.info["reason"], manifest.info["k"]) == ("test", 12)
    assert seen[-1] == (60, 60)
    written = NeighborGraph.load(uri)
    whole = geographic_graph(exclusions.places, 12, exclusions)
    rows = exclusions.places.rows(written.place_ids)
    assert sorted(rows) == list(range(60))
    assert np.array_equal(written.neighbors, whole.neighbors[rows])
    assert written.scores is not None
    assert whole.scores is not None
    assert np.array_equal(written.scores, whole.scores[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, 80])
@pytest.mark.parametrize("has_exclusions", [False, True])
def test_nearest_places_of_another_set_equal_a_loop_and_leave_out_the_place_itself(
    kind: str, k: int, has_exclusions: bool
) -> None:
    asking = make_places(kind)
    rng = np.random.default_rng(2)
    exclusions = make_exclusions(kind, 0.1) if has_exclusions else None
    shared = np.flatnonzero(rng.random(60) < 0.3)  # places of both sets
    targets = Places(
        np.append(asking.ids[shared], 1000 + np.arange(20)),
        np.append(asking.lat[shared], rng.permutation(asking.lat)[:20]),
        np.append(asking.lon[shared], rng.permutation(asking.lon)[:20]),
    )
    wide = exclusions and Exclusions(
        join_places(asking, targets), exclusions.semi_positives, exclusions.radius_m
    )
    graph = nearest_places(asking, targets, k, wide)
    assert graph.place_ids.tolist() == asking.ids.tolist()
    assert_nearest_kept(graph, asking, targets, k, wide)


def join_places(*sets: Places) -> Places:
    ids, first = np.unique(np.concatenate([s.ids for s in sets]), return_index=True)
    return Places(
        ids,
        np.concatenate([s.lat for s in sets])[first],
        np.concatenate([s.lon for s in sets])[first],
    )


def test_places_of_unknown_position_find_none_and_are_found_by_none() -> None:
    unknown = np.nan
    asking = Places(np.array([1, 2]), np.array([0.0, unknown]), np.array([0.0, 0.0]))
    targets = Places(np.array([1, 5, 6]), np.array([0.0, unknown, 2.0]), np.array([0.0, 0.0, 0.0]))
    assert nearest_places(asking, targets, 2).neighbors.tolist() == [[6, -1], [-1, -1]]
    nobody = Places(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    assert nearest_places(asking, nobody, 2).neighbors.tolist() == [[-1, -1], [-1, -1]]
    assert nearest_places(nobody, targets, 2).neighbors.shape == (0, 2)
    with pytest.raises(ValueError, match="k=0 is less than 1"):
        nearest_places(asking, targets, 0)


def test_streamed_nearest_places_equal_those_in_memory_and_leave_no_place_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.tables.neighbor_graph.PAIRS_PER_BLOCK", 130)
    exclusions = make_exclusions("metres apart", 0.1)
    rng = np.random.default_rng(0)
    lost = rng.random(60) < 0.4
    asking = Places(
        exclusions.places.ids, np.where(lost, np.nan, exclusions.places.lat), exclusions.places.lon
    )
    seen: list[tuple[int, int]] = []
    uri = str(tmp_path / "g")
    manifest = write_nearest_places(
        uri,
        asking,
        exclusions.places,
        12,
        exclusions,
        info={"reason": "test"},
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert (len(manifest.parts), manifest.info["reason"]) == (len(seen), "test")
    assert len(seen) > 4
    assert seen[-1] == (60, 60)
    written = NeighborGraph.load(uri)
    whole = nearest_places(asking, exclusions.places, 12, exclusions)
    rows = asking.rows(written.place_ids)
    assert sorted(rows) == list(range(60))
    assert np.array_equal(written.neighbors, whole.neighbors[rows])
    assert written.scores is not None
    assert whole.scores is not None
    assert np.array_equal(written.scores, whole.scores[rows])


def test_the_curve_visits_every_point_once_and_in_short_steps() -> None:
    rng = np.random.default_rng(4)
    xyz = unit_sphere(
        np.degrees(np.arcsin(rng.uniform(-1, 1, 20_000))), rng.uniform(-180, 180, 20_000)
    )
    order = curve_order(xyz)
    assert sorted(order) == list(range(20_000))
    steps = np.linalg.norm(np.diff(xyz[order], axis=0), axis=1)
    assert np.median(steps) < 0.03  # 0.014 on average to the nearest of 20,000 points


def test_memory_of_a_streamed_graph_stays_far_below_the_graph(tmp_path: Path) -> None:
    """Write 300,000 places, k=64: 230 MB as ids and scores, of which a block holds a twentieth."""
    script = f"""
import resource, numpy as np
from s4g_ray.data.places import Places
from s4g_ray.data.tables import neighbor_graph
from s4g_ray.sampling.geographic_neighbors import write_geographic_graph
rng = np.random.default_rng(0)
def peak_gb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
def draw(n): return Places(np.arange(n), rng.uniform(40, 41, n), rng.uniform(5, 6, n))
neighbor_graph.PAIRS_PER_BLOCK = 2**20
write_geographic_graph({str(tmp_path / "small")!r}, draw(20_000), 64)
before = peak_gb()
places = draw(300_000)
manifest = write_geographic_graph({str(tmp_path / "large")!r}, places, 64)
print(peak_gb() - before, sum(part.rows for part in manifest.parts))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    gigabytes, rows = done.stdout.split()
    assert float(gigabytes) < 0.12
    assert int(rows) == 300_000
