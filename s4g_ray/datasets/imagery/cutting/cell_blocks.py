"""Divide the cells of a grid into compact blocks.

The blocks follow from the cells and the size of tiles alone, never from the number of tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from s4g_ray.datasets.imagery.world_grid import GridCells, WorldGrid

SHARD_BYTES = 64e6  # of a full block, about
BYTES_PER_PIXEL = 0.45  # of aerial images as JPEG of quality 90
MEMBER_BYTES = 768  # header and padding of a tar member
MIN_TILES = 128  # of a full block, where there are few cells: 6 ms a block, 0.09 ms a small tile
MAX_SIDE = 64  # cells
BLOCKS_AT_LEAST = 64  # so that few cells, too, keep many tasks busy


@dataclass(frozen=True)
class Block:
    """Cells that one task cuts into one shard."""

    number: int
    cells: GridCells


def block_side(num_cells: int, pixels: int) -> int:
    """Return the side of blocks, in cells, for tiles of pixels x pixels."""
    tile_bytes = pixels * pixels * BYTES_PER_PIXEL + MEMBER_BYTES
    num_tiles = min(SHARD_BYTES / tile_bytes, max(MIN_TILES, num_cells / BLOCKS_AT_LEAST))
    return max(1, min(MAX_SIDE, int(num_tiles**0.5)))


def divide_cells(
    cells: GridCells, grid: WorldGrid, pixels: int, first_number: int = 0
) -> Iterator[Block]:
    """Yield the cells of a grid in blocks, southern blocks first, then western ones.

    A block spans `block_side` rows, and as much along its middle parallel. Its cells are in the
    order of their ids.
    """
    if not len(cells):
        return
    side = block_side(len(cells), pixels)
    rows, _ = grid.row_and_column(cells.ids)
    bands = rows // side
    middle = np.minimum(bands * side + side // 2, grid.num_rows - 1)
    # by longitude: the columns of a row are numbered from -180 degrees, and their number changes
    # from row to row, so that equal columns of a band do not lie below each other
    per_band = grid.num_columns(middle) / side
    columns = np.floor((cells.lon + 180) / 360 * per_band).astype(np.int64)
    order = np.lexsort((cells.ids, columns, bands))
    changed = (np.diff(bands[order]) != 0) | (np.diff(columns[order]) != 0)
    parts = np.split(order, np.flatnonzero(changed) + 1)
    for number, part in enumerate(parts, first_number):
        yield Block(number, cells.take(part))
