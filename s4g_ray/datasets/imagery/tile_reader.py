"""Read cells as tiles: one window of a source for a group of cells, one resampling for a tile.

A tile is north up, in an azimuthal equidistant projection of the WGS 84 ellipsoid about its
centre: pixel rows and columns are metres of ground there. The map from its pixels to those of a
source is computed at the tile's corners and is bilinear between them; where that is not exact to
MAX_ERROR of a pixel (large tiles, strongly curved systems), at a finer grid of points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.datasets.imagery.imagery import Imagery, Source
from s4g_ray.datasets.imagery.rasters.georeference import GEOD, Georeference
from s4g_ray.datasets.imagery.resampling import resample
from s4g_ray.datasets.imagery.world_grid import GridCells
from s4g_ray.errors import InputError

MAX_WINDOW_BYTES = 256 << 20  # of source pixels and their bytes, as read at once
# of tiles that are cut together: memory of this size is used again, larger pieces are new each time
MAX_TILE_BYTES = 16 << 20
MAX_WASTE = 4.0  # pixels of a window for each pixel of its tiles
MIN_WINDOW = 1 << 20  # pixels: smaller windows are not divided to save waste
MAX_ERROR = 0.1  # pixels of the tile
MAX_GRID = 16  # cells along a side of the grid of points
COARSE = 1.2  # window pixels in a tile's pixel from which a pixel is averaged
MAX_SAMPLES = 32  # on an axis, of an average: for pyramids without coarse zooms
NO_IMAGERY = "no imagery"  # no source holds data for any pixel of the tile


@dataclass(frozen=True, eq=False)
class Tile:
    """A tile: pixels[P, P, 3] of size_m metres of ground on a side, black where no data is."""

    id: int
    lat: float
    lon: float
    size_m: float
    pixels: NDArray[np.uint8]
    nodata_share: float


@dataclass(frozen=True)
class Dropped:
    """A cell without a tile, and the reason."""

    id: int
    reason: str


@dataclass(frozen=True, eq=False)
class _Placed:
    """Where the tiles of some cells lie in a source.

    rows[N]: of the cells. points[N, G + 1, G + 1, 2]: columns and rows of the source. scale: source
    pixels in a tile's pixel, the median.
    """

    rows: Ints
    points: Floats64
    factor: int  # source pixels in a pixel that is read
    scale: float

    def take(self, chosen: Ints) -> _Placed:
        return _Placed(self.rows[chosen], self.points[chosen], self.factor, self.scale)


def read_tiles(
    imagery: Imagery, cells: GridCells, *, pixels: int, stretch: Stretch
) -> Iterator[Tile | Dropped]:
    """Yield a tile of pixels * pixels, or the reason why there is none, for each cell, in order.

    Pixels without data in the first source are taken from the next one that has them. Give cells
    that lie together (world_grid.split_blocks): tiles of up to MAX_TILE_BYTES are cut from one
    window, which has at most MAX_WINDOW_BYTES. stretch: as choose_stretch returns it. Raises
    InputError for a source that is damaged, and for a stretch that does not fit it.
    """
    if pixels < 1:
        raise InputError(f"--pixels {pixels} must be 1 or more")
    together = max(1, MAX_TILE_BYTES // (pixels * pixels * 4))
    for start in range(0, len(cells), together):
        chosen = cells.take(slice(start, start + together))
        yield from _read_together(imagery, chosen, pixels, stretch)


def _read_together(
    imagery: Imagery, cells: GridCells, pixels: int, stretch: Stretch
) -> Iterator[Tile | Dropped]:
    tiles = np.zeros((len(cells), pixels, pixels, 3), np.uint8)
    filled = np.zeros((len(cells), pixels, pixels), np.uint8)
    counts = np.zeros(len(cells), np.int64)
    for source in imagery.sources:
        missing = np.flatnonzero(counts < pixels * pixels)
        near = missing[_is_near(source.georeference, cells.take(missing))]
        if not len(near):
            continue
        placed = _place(source, cells, near, pixels)
        for copy in _copies(placed, source.georeference):
            for group in _divide(copy, source, pixels):
                _fill(source, group, stretch, tiles, filled, counts)
    for row in range(len(cells)):
        cell_id = int(cells.ids[row])
        if not counts[row]:
            yield Dropped(cell_id, NO_IMAGERY)
            continue
        share = 1 - float(counts[row]) / pixels**2
        place = (float(cells.lat[row]), float(cells.lon[row]))
        yield Tile(cell_id, *place, cells.size_m, tiles[row], share)


def _is_near(place: Georeference, cells: GridCells) -> NDArray[np.bool_]:
    """Return which cells may meet a raster, by its extent in degrees."""
    west, south, east, north = place.extent
    reach = cells.size_m * 0.75  # of a corner, and a little more
    lat_reach = reach / 110_000
    cosine = np.cos(np.radians(np.minimum(np.abs(cells.lat) + lat_reach, 90)))
    lon_reach = np.where(cosine > 1e-3, reach / 110_000 / np.maximum(cosine, 1e-3), 360)
    lon_reach = np.minimum(lon_reach, 180)
    in_lon = (cells.lon - west + lon_reach) % 360 <= (east - west) + 2 * lon_reach
    in_lat = (cells.lat >= south - lat_reach) & (cells.lat <= north + lat_reach)
    return in_lon & in_lat


def local_to_degrees(
    cells: GridCells, east: Floats64, north: Floats64
) -> tuple[Floats64, Floats64]:
    """Return lat[N, P], lon[N, P] of points[P], in metres east and north of each cell's centre."""
    shape = (len(cells), len(east))
    azimuth = np.broadcast_to(np.degrees(np.arctan2(east, north)), shape)
    metres = np.broadcast_to(np.hypot(east, north), shape)
    lon, lat, _ = GEOD.fwd(
        np.broadcast_to(cells.lon[:, None], shape).ravel(),
        np.broadcast_to(cells.lat[:, None], shape).ravel(),
        azimuth.ravel(),
        metres.ravel(),
    )
    return np.asarray(lat).reshape(shape), np.asarray(lon).reshape(shape)


def _map_points(place: Georeference, cells: GridCells, num_cells: int) -> Floats64:
    """Return columns and rows in a raster of each tile's points: [N, G + 1, G + 1, 2]."""
    axis = np.linspace(-0.5, 0.5, num_cells + 1) * cells.size_m
    east, south = np.meshgrid(axis, axis)
    lat, lon = local_to_degrees(cells, east.ravel(), -south.ravel())
    column, row = place.to_pixels(lat, lon)
    if place.period:
        # columns of one turn, then continuous from the tile's first corner
        column -= place.period * np.floor(column[:, :1] / place.period)
        column -= place.period * np.round((column - column[:, :1]) / place.period)
    return np.stack([column, row], axis=-1).reshape(-1, num_cells + 1, num_cells + 1, 2)


def _place(source: Source, cells: GridCells, rows: Ints, pixels: int) -> _Placed:
    """Map the tiles of cells (row numbers) into a source; leaves out those without a place."""
    chosen = cells.take(rows)
    place = source.georeference
    extremes = np.unique([chosen.lat.argmin(), chosen.lat.argmax(), chosen.lon.argmin()])
    num_cells = 1
    while num_cells < MAX_GRID and _error(place, chosen.take(extremes), num_cells, pixels):
        num_cells *= 2
    points = _map_points(place, chosen, num_cells)
    known = np.isfinite(points).all(axis=(1, 2, 3))
    scales = _scales(points[known], pixels)
    scale = float(np.median(scales)) if len(scales) else 1.0
    return _Placed(rows[known], points[known], source.choose_factor(scale), scale)


def _scales(points: Floats64, pixels: int) -> Floats64:
    """Return the source pixels in a tile's pixel [N]: the geometric mean of both axes."""
    across = points[:, 0, -1] - points[:, 0, 0]
    down = points[:, -1, 0] - points[:, 0, 0]
    sides = np.hypot(across[:, 0], across[:, 1]) * np.hypot(down[:, 0], down[:, 1])
    return np.asarray(np.sqrt(sides)) / pixels


def _error(place: Georeference, cells: GridCells, num_cells: int, pixels: int) -> bool:
    """Return whether a grid of points is too coarse: compared with twice as many points."""
    finer = _map_points(place, cells, 2 * num_cells)
    finer = finer[np.isfinite(finer).all(axis=(1, 2, 3))]
    if not len(finer):
        return False
    coarse = finer[:, ::2, ::2]
    guess = np.empty_like(finer)
    guess[:, ::2, ::2] = coarse
    guess[:, 1::2, ::2] = (coarse[:, :-1] + coarse[:, 1:]) / 2
    guess[:, :, 1::2] = (guess[:, :, :-1:2] + guess[:, :, 2::2]) / 2
    error = np.abs(guess - finer).max(axis=(1, 2, 3)) / np.maximum(_scales(finer, pixels), 1e-9)
    return bool((error > MAX_ERROR).any())


def _copies(placed: _Placed, place: Georeference) -> Iterator[_Placed]:
    """Yield the tiles that meet a raster, and again a turn of the Earth to its west and east."""
    turns = (0.0,) if place.period is None else (0.0, -place.period, place.period)
    low = placed.points.min(axis=(1, 2))
    high = placed.points.max(axis=(1, 2))
    for turn in turns:
        shift = np.array([turn, 0.0])
        meets = ((high + shift > 0) & (low + shift < [place.width, place.height])).all(axis=1)
        rows = np.flatnonzero(meets)
        if len(rows):
            yield _Placed(
                placed.rows[rows], placed.points[rows] + shift, placed.factor, placed.scale
            )


def _window(placed: _Placed, place: Georeference) -> tuple[int, int, int, int]:
    """Return column, row, width, height of a window around tiles, on whole steps of the factor."""
    step = placed.factor
    margin = 2 * step
    low = np.floor((placed.points.min(axis=(0, 1, 2)) - margin) / step) * step
    high = np.ceil((placed.points.max(axis=(0, 1, 2)) + margin) / step) * step
    column, row = np.maximum(low, 0).astype(int)
    right, bottom = np.minimum(high, [place.width, place.height]).astype(int)
    return int(column), int(row), int(right - column), int(bottom - row)


def _divide(placed: _Placed, source: Source, pixels: int) -> Iterator[_Placed]:
    """Divide tiles until the window of each group fits in memory and is used well."""
    _, _, width, height = _window(placed, source.georeference)
    read = width * height / placed.factor**2
    used = len(placed.rows) * (pixels * placed.scale / placed.factor) ** 2
    # bands with an alpha band, the same beside each other, and bytes with a mask
    item = 7 * np.dtype(source.dtype).itemsize + 4
    wasteful = read > MIN_WINDOW and read > MAX_WASTE * used
    if len(placed.rows) == 1 or not (read * item > MAX_WINDOW_BYTES or wasteful):
        yield placed
        return
    centres = placed.points.mean(axis=(1, 2))
    order = np.argsort(centres[:, np.argmax(np.ptp(centres, axis=0))], kind="stable")
    middle = len(order) // 2
    yield from _divide(placed.take(np.sort(order[:middle])), source, pixels)
    yield from _divide(placed.take(np.sort(order[middle:])), source, pixels)


def _fill(
    source: Source,
    group: _Placed,
    stretch: Stretch,
    tiles: NDArray[np.uint8],
    filled: NDArray[np.uint8],
    counts: Ints,
) -> None:
    """Read the window of a group of tiles and fill their pixels that are still missing."""
    column, row, width, height = _window(group, source.georeference)
    if width <= 0 or height <= 0:
        return
    piece = source.read(column, row, width, height, group.factor)
    values = stretch.apply(piece.values)
    if values.shape[2] == 1:
        values = np.repeat(values, 3, axis=2)
    shrunk = np.array([values.shape[1] / width, values.shape[0] / height])
    points = (group.points - [column, row]) * shrunk
    ratio = group.scale / group.factor
    samples = min(int(np.ceil(ratio - 0.2)), MAX_SAMPLES) if ratio > COARSE else 1
    for number, tile in enumerate(group.rows):
        counts[tile] += resample(
            values, piece.valid, points[number], samples, tiles[tile], filled[tile]
        )
