"""Tiles without imagery, for tests of what is done with them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from s4g_ray.datasets.imagery.cutting.region import CutOptions, GridPart, TileSource
from s4g_ray.datasets.imagery.tile_reader import Dropped, Tile
from s4g_ray.datasets.imagery.world_grid import GridCells, WorldGrid

SMALL = CutOptions(pixels=16)


@dataclass(frozen=True)
class MadeUpReader:
    """Makes each cell's tile from its id: every 7th is dropped, every 11th has 10 % nodata."""

    pixels: int = 16
    drops_all: bool = False

    def __call__(self, cells: GridCells) -> Iterator[Tile | Dropped]:
        for number in range(len(cells)):
            id_ = int(cells.ids[number])
            if self.drops_all or id_ % 7 == 0:
                yield Dropped(id_, "outside the imagery")
                continue
            rng = np.random.default_rng(id_)
            grey = rng.integers(0, 256, (self.pixels // 8, self.pixels // 8, 1), dtype=np.uint8)
            pixels = grey.repeat(8, axis=0).repeat(8, axis=1).repeat(3, axis=2)
            share = 0.1 if id_ % 11 == 0 else 0.0
            place = (float(cells.lat[number]), float(cells.lon[number]))
            yield Tile(id_, *place, cells.size_m, pixels, share)


@dataclass(frozen=True)
class KillingReader:
    """Makes the same tiles; kills the first process that asks for some, and creates a file then."""

    file: str

    def __call__(self, cells: GridCells) -> Iterator[Tile | Dropped]:
        try:
            Path(self.file).touch(exist_ok=False)
        except FileExistsError:
            return MadeUpReader()(cells)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a process outlived SIGKILL")


def make_source(**changes: Any) -> TileSource:
    """Return a source of made-up tiles."""
    return TileSource(
        read=MadeUpReader(**changes),
        identity=repr(changes),
        stretch="full",
        native_resolution_m=4.0,
        footprint=shapely.box(10.0, 50.0, 10.02, 50.01),
    )


def make_part(
    size_m: float = 60.0, overlap: float = 0.0, bounds: Any = (10.0, 50.0, 10.02, 50.01)
) -> GridPart:
    """Return the cells of a grid within bounds: 23 x 18 of 60 m by default."""
    grid = WorldGrid(size_m, overlap)
    return GridPart(grid, grid.cells_in(bounds=bounds))


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
