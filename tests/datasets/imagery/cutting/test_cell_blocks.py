from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets.imagery.cutting.cell_blocks import block_side, divide_cells
from s4g_ray.datasets.imagery.world_grid import WorldGrid


@pytest.mark.parametrize("lat", [0.0, 47.0, -78.0])
def test_blocks_are_compact_and_hold_each_cell_once(lat: float) -> None:
    grid = WorldGrid(100.0, 0.5)
    width = 0.05 / np.cos(np.radians(lat))
    cells = grid.cells_in(bounds=(120.0, lat, 120.0 + width, lat + 0.05))
    blocks = list(divide_cells(cells, grid, 64, first_number=5))
    assert [block.number for block in blocks] == list(range(5, 5 + len(blocks)))
    together = np.concatenate([block.cells.ids for block in blocks])
    assert np.array_equal(np.sort(together), np.sort(cells.ids))
    side = block_side(len(cells), 64)
    assert 8 <= side < 64
    for block in blocks:
        assert (np.diff(block.cells.ids) > 0).all()
        low, high = block.cells.lat.min(), block.cells.lat.max()
        west, east = block.cells.lon.min(), block.cells.lon.max()
        assert metres_between(low, 0, high, 0) < (side + 1) * grid.step_m
        assert metres_between(low, west, low, east) < (side + 2) * grid.step_m
    full = sum(len(block.cells) > 0.8 * side**2 for block in blocks)
    assert full > 0.5 * len(blocks)


def test_a_shard_of_many_large_tiles_is_about_64_megabytes() -> None:
    side = block_side(10**7, 384)
    assert 40e6 < side**2 * (384**2 * 0.45 + 768) <= 64e6
    assert block_side(10**9, 16) == 64
    assert block_side(1, 384) == 11
    assert (
        list(divide_cells(WorldGrid(60.0).cells_in(bounds=(0, 0, 0, 0)), WorldGrid(60.0), 64)) == []
    )
