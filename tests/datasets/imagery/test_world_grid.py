from __future__ import annotations

import numpy as np
import pytest
from pyproj import Geod

from s4g_ray.data.area import Area
from s4g_ray.datasets.imagery.world_grid import WorldGrid, check_grids, split_blocks
from s4g_ray.errors import InputError

GEOD = Geod(ellps="WGS84")


@pytest.mark.parametrize("lat", [-78.5, -33.0, 0.0, 40.8, 69.0])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_neighbors_are_a_step_apart_on_the_ellipsoid(lat: float, overlap: float) -> None:
    grid = WorldGrid(60, overlap)
    cells = grid.cells_in(bounds=(15.0, lat, 15.02, lat + 0.01))
    rows, columns = grid.row_and_column(cells.ids)
    beside = np.flatnonzero((np.diff(rows) == 0) & (np.diff(columns) == 1))
    metres = GEOD.inv(
        cells.lon[beside], cells.lat[beside], cells.lon[beside + 1], cells.lat[beside + 1]
    )[2]
    assert np.allclose(metres, grid.step_m, rtol=2e-5)
    lats = np.unique(cells.lat)
    metres = GEOD.inv(0 * lats[1:], lats[1:], 0 * lats[1:], lats[:-1])[2]
    assert np.allclose(metres, grid.step_m, rtol=2e-6)


def test_ids_stay_as_they_are() -> None:
    cells = WorldGrid(60).cells_in(bounds=(-112.5, 40.7, -112.499, 40.701))
    assert cells.ids.tolist() == GOLDEN
    assert WorldGrid(60.0, 0.0).first_id == WorldGrid(60).first_id != WorldGrid(60, 0.5).first_id


GOLDEN = [1198209047564417382, 1198209047564417383, 1198209047565085299, 1198209047565085300]


def test_a_cell_has_one_id_whatever_is_asked_for() -> None:
    grid = WorldGrid(200_000)
    everything = grid.cells_in()
    assert (
        len(np.unique(everything.ids)) == len(everything) == grid.count_within((-180, -90, 180, 90))
    )
    west = grid.cells_in(bounds=(-180, -90, 20, 90)).ids
    east = grid.cells_in(bounds=(20, -90, 180, 90)).ids
    assert set(west).isdisjoint(east)
    assert set(west) | set(east) == set(everything.ids)
    rows, columns = grid.row_and_column(everything.ids)
    again = grid.cells_of(rows, columns)
    assert (again.lat == everything.lat).all()
    assert (again.lon == everything.lon).all()


@pytest.mark.parametrize(
    "bounds", [(179.0, -1, -179.0, 1), (179.0, -1, 181.0, 1), (-181, -1, -179, 1)]
)
def test_bounds_cross_the_antimeridian(bounds: tuple[float, float, float, float]) -> None:
    grid = WorldGrid(50_000)
    cells = grid.cells_in(bounds=bounds)
    expected = grid.cells_in()
    inside = (np.abs(expected.lon) >= 179) & (np.abs(expected.lat) < 1)
    assert sorted(cells.ids) == sorted(expected.ids[inside])
    assert np.abs(cells.lon).max() <= 180


def test_an_area_keeps_cells_whose_centre_it_holds() -> None:
    grid = WorldGrid(1000)
    area = Area.circle(-17.0, 179.99, 8_000)
    cells = grid.cells_in(area)
    everything = grid.cells_in(bounds=(179, -18, -179, -16))
    inside = area.contains(everything.lat, everything.lon)
    assert set(cells.ids) == set(everything.ids[inside])
    assert len(cells) == pytest.approx(np.pi * 64, rel=0.05)


def test_poles_have_cells_too() -> None:
    grid = WorldGrid(1000)
    cells = grid.cells_in(Area.circle(90, 0, 3_000))
    assert len(cells) == pytest.approx(np.pi * 9, rel=0.3)


def test_blocks_are_compact_and_hold_each_cell_once() -> None:
    grid = WorldGrid(1000)
    cells = grid.cells_in(bounds=(170.0, 60.0, -170.0, 61.0))
    blocks = list(split_blocks(grid, cells, side=8))
    assert sorted(np.concatenate([block.ids for block in blocks])) == sorted(cells.ids)
    for block in blocks:
        assert len(block) <= 64
        lon = block.lon % 360
        assert np.ptp(lon) * 55_800 < 26_000
        assert np.ptp(block.lat) * 111_300 < 8_000


def test_grids_are_refused() -> None:
    with pytest.raises(InputError, match="--overlap 1"):
        WorldGrid(60, 1.0)
    with pytest.raises(InputError, match=r"0\.01 m apart"):
        WorldGrid(0.01)
    with pytest.raises(InputError, match="nan"):
        WorldGrid(float("nan"))
    with pytest.raises(InputError, match="share ids"):
        check_grids([WorldGrid(60), WorldGrid(60)])
    check_grids([WorldGrid(60), WorldGrid(120), WorldGrid(60, 0.5)])
    with pytest.raises(InputError, match="no cell"):
        WorldGrid(60).row_and_column([7])
