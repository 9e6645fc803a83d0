"""A map view shows tiles that cover it, few of them, never more than asked."""

from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.data.sphere import METRES_A_DEGREE
from s4g_ray.errors import InputError
from s4g_ray.gallery.search.map_view import MapView

SIZE = 1000.0
GLOBE = (-180.0, -85.0, 180.0, 85.0)


def grid(lat: float, lon: float, rows: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres of rows x rows cells, `step` metres apart, about a point."""
    offsets = (np.arange(rows) - (rows - 1) / 2) * step / METRES_A_DEGREE
    lats = np.repeat(lat + offsets, rows)
    lons = lon + np.tile(offsets, rows) / np.cos(np.radians(lats))
    return lats, (lons + 180) % 360 - 180


def view(lats: np.ndarray, lons: np.ndarray, size: float = SIZE) -> MapView:
    return MapView(lats, lons, np.full(len(lats), size))


@pytest.mark.parametrize(("lat", "lon"), [(41.0, -112.5), (-17.0, 180.0), (68.0, 20.0)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_no_point_of_the_ground_is_left_out(lat: float, lon: float, overlap: float) -> None:
    side = 8000.0
    count = int(side / (SIZE * (1 - overlap)))
    lats, lons = grid(lat, lon, count, SIZE * (1 - overlap))
    half = (count - 1) / 2 * SIZE * (1 - overlap) / METRES_A_DEGREE
    half_lon = half / np.cos(np.radians(lat))
    bounds = (lon - half_lon, lat - half, lon + half_lon, lat + half)
    rows = view(lats, lons).rows(bounds, 300)
    assert len(rows) <= 2.5 * (side / SIZE) ** 2
    points = np.random.default_rng(0).uniform(-1, 1, (500, 2))
    north = np.abs(lats[rows] - (lat + points[:, :1] * half))
    east = np.abs((lons[rows] - (lon + points[:, 1:] * half_lon) + 180) % 360 - 180)
    farthest = np.maximum(north, east * np.cos(np.radians(lats[rows]))) * METRES_A_DEGREE
    assert farthest.min(axis=1).max() <= SIZE * 0.51


def test_tiles_without_overlap_are_all_shown_and_only_those_in_view() -> None:
    lats, lons = grid(0.01, 10.0, 8, SIZE)
    tiles = view(lats, lons)
    assert len(tiles.rows(GLOBE, 100)) == 64
    east = 10.0 - 2.1 * SIZE / METRES_A_DEGREE
    west_part = tiles.rows((9.0, -1.0, east, 1.0), 100)
    assert sorted(west_part) == [row for row in range(64) if row % 8 < 2]


def test_scattered_tiles_are_all_shown() -> None:
    rng = np.random.default_rng(1)
    lats, lons = rng.uniform(-50, 50, 200), rng.uniform(-180, 180, 200)
    assert len(view(lats, lons).rows(GLOBE, 300)) == 200


def test_a_moved_view_keeps_the_tiles_that_it_had() -> None:
    lats, lons = grid(41.0, -112.5, 20, SIZE * 0.37)
    tiles = view(lats, lons)
    everything = set(tiles.rows(GLOBE, 1000))
    for west in np.linspace(-112.55, -112.5, 7):
        assert set(tiles.rows((west, 40.98, west + 0.03, 41.01), 1000)) <= everything


def test_a_view_of_too_many_tiles_shows_none() -> None:
    lats, lons = grid(41.0, -112.5, 20, SIZE)
    assert len(view(lats, lons).rows(GLOBE, 399)) == 0
    assert len(view(lats, lons).rows(GLOBE, 400)) == 400


def test_large_tiles_come_first_and_unknown_sizes_never() -> None:
    same = np.full(3, 41.0)
    tiles = MapView(same, -same, np.array([100.0, np.nan, 400.0]))
    assert tiles.rows(GLOBE, 10).tolist() == [2, 0]
    assert len(MapView(same, same, np.full(3, np.nan)).rows(GLOBE, 10)) == 0
    nothing = np.empty(0)
    assert len(MapView(nothing, nothing, nothing).rows(GLOBE, 10)) == 0


def test_a_bound_or_limit_that_is_no_use_is_refused() -> None:
    tiles = view(np.zeros(1), np.zeros(1))
    with pytest.raises(InputError, match="bounds="):
        tiles.rows((0, 5, 1, np.nan), 10)
    with pytest.raises(InputError, match="limit=0"):
        tiles.rows((0, 0, 1, 1), 0)
