"""Define Imagery: rasters in order, the first of which wins where they overlap."""

from __future__ import annotations

import s4g_ray.datasets.imagery.libraries  # noqa: F401 - first: it names the extra

# isort: split
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from s4g_ray.arrays import space_rows
from s4g_ray.data.area import Area, Extent, join_extents
from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.datasets.imagery.rasters.file_versions import fingerprint_files
from s4g_ray.datasets.imagery.rasters.georeference import Georeference
from s4g_ray.datasets.imagery.rasters.raster import Piece
from s4g_ray.datasets.imagery.world_grid import Bounds, GridCells, WorldGrid
from s4g_ray.errors import InputError

NUM_SAMPLED = 32  # rasters that a stretch is sampled from
SAMPLE_SIDE = 512  # pixels of a sample of a raster, at most
MAX_SAMPLE = 1 << 20  # pixels: of a larger sample (no coarse zoom) only windows are read
NUM_WINDOWS = 16  # on an axis
WINDOW_SIDE = 64  # pixels as read
MAX_CELLS = 100_000_000  # of a grid


class Source(Protocol):
    """A raster, as a tile is cut from it: Raster or Pyramid."""

    @property
    def uri(self) -> str:
        """Name the file or folder."""

    @property
    def georeference(self) -> Georeference:
        """Return where its pixels lie."""

    @property
    def dtype(self) -> str:
        """Name the type of its values."""

    @property
    def highest(self) -> int:
        """Return the largest value, of bytes."""

    @property
    def has_other_bands(self) -> bool:
        """Return whether there are bands that are not read."""

    def choose_factor(self, scale: float) -> int:
        """Return how many pixels (on an axis) reading averages, for tiles of scale pixels."""

    def read(self, column: int, row: int, width: int, height: int, factor: int) -> Piece:
        """Read a window; column and row are multiples of factor."""

    def list_files(self) -> list[str]:
        """Return the files and folders that its pixels come from."""

    def describe(self) -> dict[str, Any]:
        """Return what is known of it."""


@dataclass(frozen=True)
class Imagery:
    """Rasters in any reference systems. Small and picklable: files are opened where they are read.

    Where rasters overlap, the first one with data counts.
    """

    sources: tuple[Source, ...]

    @cached_property
    def extent(self) -> Extent:
        """Return west, south, east, north around all; east is above 180 across the antimeridian."""
        return join_extents([source.georeference.extent for source in self.sources])

    @cached_property
    def footprint(self) -> BaseGeometry:
        """Return the union of the rasters' footprints in degrees, cut at the antimeridian."""
        return shapely.union_all([source.georeference.footprint for source in self.sources])

    @cached_property
    def native_resolution_m(self) -> float:
        """Return the metres of a pixel of the finest raster."""
        found = [source.georeference.resolution_m for source in self.sources]
        return float(np.nanmin(found))

    @property
    def identity(self) -> str:
        """Return a text that differs for other rasters, and once a file of them is rewritten."""
        names = [name for source in self.sources for name in source.list_files()]
        return f"{self.sources!r} {fingerprint_files(names)}"

    def describe(self) -> dict[str, Any]:
        """Return what is known of the imagery, for people and JSON."""
        found = [source.describe() for source in self.sources]
        return {
            "num_sources": len(found),
            "extent": [round(value, 7) for value in self.extent],
            "resolution_m": self.native_resolution_m,
            "crs": dict(Counter(source["crs"] for source in found)),
            "dtypes": sorted({source["dtype"] for source in found}),
            "bands": found[0]["bands"],
            "sources": found[:10],
        }


def find_cells(
    imagery: Imagery,
    grid: WorldGrid,
    area: Area | None = None,
    bounds: Bounds | None = None,
) -> GridCells:
    """Return the cells of a grid whose centres lie in the imagery, and in an area or bounds.

    In the order of rows, eastwards. Raises InputError when no cell does (its message gives both
    extents), and for more than MAX_CELLS.
    """
    if bounds is not None:
        wanted = Area.bounds(*bounds)
        if area is not None:
            raise InputError("give an area or bounds, not both")
        area = wanted
    found = [_overlap(source.georeference.extent, area) for source in imagery.sources]
    num_cells = sum(map(grid.count_within, found))
    if num_cells > MAX_CELLS:
        raise InputError(
            f"{num_cells:,} cells of {grid.size_m:g} m, {grid.step_m:g} m apart, lie in the imagery"
            f" and the area, more than {MAX_CELLS:,}; give a larger size (--size-m), or a smaller"
            " area or bounds"
        )
    parts = [grid.cells_in(bounds=one) for one in found]
    ids = np.unique(np.concatenate([part.ids for part in parts]))
    cells = grid.cells_of(*grid.row_and_column(ids))
    if area is not None:
        cells = cells.take(area.contains(cells.lat, cells.lon))
    if not len(cells):
        if area is None:
            raise InputError(
                f"no cell of {grid.size_m:g} m has its centre in the imagery, which spans"
                f" {_format(imagery.extent)} (west, south, east, north in degrees); give a smaller"
                " size"
            )
        raise InputError(
            f"no cell of {grid.size_m:g} m has its centre in both the imagery"
            f" ({_format(imagery.extent)}) and the area ({_format(area.extent)}); extents are west,"
            " south, east, north in degrees: give an area within the imagery, or smaller cells"
        )
    return cells


def _overlap(extent: Extent, area: Area | None) -> Bounds:
    """Return bounds within an extent that hold all of an area's points there, often no others."""
    if area is None:
        return extent
    west, south, east, north = extent
    other = area.extent
    south = max(south, other[1])
    north = max(min(north, other[3]), south)
    start = west + (other[0] - west) % 360
    # cut to the area's meridians where it begins within the extent and does not come around again
    if start <= east and start + (other[2] - other[0]) - 360 < west:
        return start, south, min(east, start + other[2] - other[0] + 1e-9), north
    return west, south, east, north


def _format(extent: Extent) -> str:
    return ", ".join(f"{value:.6g}" for value in extent)


def choose_stretch(imagery: Imagery, stretch: Stretch | None = None) -> Stretch:
    """Return a stretch that can be applied: percentiles are looked up in a sample of the imagery.

    stretch: None stands for `full` where all rasters hold bytes, for 0 to the largest value where
    they hold fewer bits, else for percentiles 2 and 98.
    The same imagery gives the same stretch. Raises InputError for imagery without data.
    """
    if stretch is None:
        is_bytes = all(source.dtype == "uint8" for source in imagery.sources)
        highest = max(source.highest for source in imagery.sources)
        if not is_bytes:
            stretch = Stretch(percentiles=(2.0, 98.0))
        elif highest < 255:
            stretch = Stretch((0.0,), (float(highest),))
        else:
            stretch = Stretch()
    if stretch.percentiles is None or stretch.low is not None:
        for source in imagery.sources:
            stretch.range_for(np.dtype(source.dtype), len(stretch.low or (0,)))
        return stretch
    chosen = space_rows(len(imagery.sources), NUM_SAMPLED)
    samples = [_sample(imagery.sources[number]) for number in chosen]
    if len({sample.shape[1] for sample in samples}) > 1:
        raise InputError("some rasters have one band and others three; give --bands")
    values = np.concatenate(samples)
    if not len(values):
        raise InputError("the sample of the imagery holds no data; give --stretch LOW,HIGH")
    low, high = np.percentile(values, stretch.percentiles, axis=0)
    high = np.where(high > low, high, low + 1)  # a plain band
    return Stretch(tuple(map(float, low)), tuple(map(float, high)), stretch.percentiles)


def _sample(source: Source) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return values[N, C] with data, spread over a raster."""
    place = source.georeference
    factor = source.choose_factor(max(place.width, place.height) / SAMPLE_SIDE + 1)
    columns, width = _spread(place.width, factor)
    rows, height = _spread(place.height, factor)
    if place.width * place.height <= MAX_SAMPLE * factor**2:
        columns, width = [0], place.width
        rows, height = [0], place.height
    parts = []
    for row in rows:
        for column in columns:
            piece = source.read(column, row, width, height, factor)
            flat = piece.values.reshape(-1, piece.values.shape[2]).astype(np.float64)
            parts.append(flat[piece.valid.ravel() > 0] if len(piece.valid) else flat)
    return np.concatenate(parts)


def _spread(length: int, factor: int) -> tuple[list[int], int]:
    """Return where windows begin that are spread over an axis, and their length."""
    size = min(length, WINDOW_SIDE * factor)
    starts = np.linspace(0, length - size, NUM_WINDOWS) // factor * factor
    return np.unique(starts).astype(int).tolist(), size
