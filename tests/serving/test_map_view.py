"""A map view shows tiles that cover it, none twice, never more than asked."""

from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.errors import InputError
from s4g_ray.serving.map_view import METRES_PER_DEGREE, tiles_in_view

SIZE = 1000.0


def grid(lat: float, lon: float, rows: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres of rows x rows cells, `step` metres apart, about a point."""
    offsets = (np.arange(rows) - (rows - 1) / 2) * step / METRES_PER_DEGREE
    north, east = np.meshgrid(offsets, offsets / np.cos(np.radians(lat)), indexing="ij")
    return lat + north.ravel(), (lon + east.ravel() + 180) % 360 - 180


@pytest.mark.parametrize(("lat", "lon"), [(41.0, -112.5), (-17.0, 180.0), (68.0, 20.0)])
def test_every_point_of_the_view_lies_in_or_near_a_tile(lat: float, lon: float) -> None:
    lats, lons = grid(lat, lon, 21, SIZE / 2)
    sizes = np.full(len(lats), SIZE)
    half = 2000 / METRES_PER_DEGREE
    half_lon = half / np.cos(np.radians(lat))
    bounds = (lon - half_lon, lat - half, lon + half_lon, lat + half)
    rows = tiles_in_view(lats, lons, sizes, bounds, 100)
    assert 16 <= len(rows) <= 49  # of the 100 whose squares meet the view
    rng = np.random.default_rng(0)
    for _ in range(200):
        point_lat = rng.uniform(bounds[1], bounds[3])
        point_lon = rng.uniform(bounds[0], bounds[2])
        north = np.abs(lats[rows] - point_lat) * METRES_PER_DEGREE
        turned = np.abs((lons[rows] - point_lon + 180) % 360 - 180)
        east = turned * METRES_PER_DEGREE * np.cos(np.radians(lat))
        assert np.maximum(north, east).min() <= SIZE * 0.75


def test_tiles_without_overlap_are_all_shown_and_only_those_in_view() -> None:
    lats, lons = grid(0.01, 10.0, 8, SIZE * 1.01)
    sizes = np.full(len(lats), SIZE)
    everything = tiles_in_view(lats, lons, sizes, (-180, -85, 180, 85), 100)
    assert len(everything) >= 0.9 * len(lats)
    west_half = tiles_in_view(lats, lons, sizes, (9.0, -1, 10.0 - 2 * SIZE / METRES_PER_DEGREE, 1), 100)
    assert 0 < len(west_half) < len(everything)
    assert (lons[west_half] < 10).all()


def test_a_view_of_too_many_tiles_shows_none() -> None:
    lats, lons = grid(41.0, -112.5, 20, SIZE)
    sizes = np.full(len(lats), SIZE)
    assert len(tiles_in_view(lats, lons, sizes, (-114, 40, -111, 42), 100)) == 0


def test_large_tiles_come_first_and_unknown_sizes_never() -> None:
    lats = np.array([41.0, 41.0, 41.0])
    lons = np.array([-112.5, -112.5, -112.5])
    rows = tiles_in_view(lats, lons, np.array([100.0, np.nan, 400.0]), (-113, 40, -112, 42), 10)
    assert rows.tolist() == [2, 0]


def test_a_bound_or_limit_that_is_no_use_is_refused() -> None:
    one = np.zeros(1)
    with pytest.raises(InputError, match="bounds="):
        tiles_in_view(one, one, one, (0, 5, 1, np.nan), 10)
    with pytest.raises(InputError, match="limit=0"):
        tiles_in_view(one, one, one, (0, 0, 1, 1), 0)
