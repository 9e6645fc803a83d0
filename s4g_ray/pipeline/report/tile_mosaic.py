"""Make a map's background of the gallery's own tiles, bounded in number and time.

Tiles that cover most new ground are read first. Where too many are needed, the map is divided into
cells, and each takes the mean color of the tile nearest to its middle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats64, Ints, spread_rows
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.images import load_raws, resize
from s4g_ray.errors import BadImageError
from s4g_ray.pipeline.report.map_frame import MapFrame

Canvas = NDArray[np.uint8]  # [H, W, 4]: RGB, and 255 where a tile was drawn

MAX_CANDIDATES = 30_000  # tiles whose ground is compared with what is covered
MAX_TILES = 1500  # that are read for one map
MAX_SECONDS = 12.0  # of reading for one map
LARGEST = 4  # times the canvas: larger tiles are left out
EDGE = 1e-6  # of a pixel: rounding of an edge that lies between two
LEAST_NEW = (0.9, 0.3, 0.03)  # share of a tile's ground that is not covered yet, in each pass


def draw_mosaic(
    frame: MapFrame, table: ImageTable, size_m: Floats64, shape: tuple[int, int]
) -> Canvas:
    """Draw tiles of a table, with the sides of their ground size_m[N] -> canvas[H, W, 4].

    Tiles without coordinates or size are left out, and those that cannot be decoded.
    """
    boxes = frame.boxes(table.lat, table.lon, size_m)
    left, right, bottom, top = boxes.T
    is_seen = (right > -frame.half_width_m) & (left < frame.half_width_m)
    is_seen &= (top > -frame.half_height_m) & (bottom < frame.half_height_m)
    rows = np.flatnonzero(is_seen & (size_m > 0))
    canvas = np.zeros((*shape, 4), np.uint8)
    if not len(rows):
        return canvas
    rows = rows[np.argsort(-size_m[rows], kind="stable")]
    rows = rows[spread_rows(len(rows), MAX_CANDIDATES, 0)]
    pixels = _to_pixels(frame, boxes[rows], shape)
    chosen, num_covered = _choose_tiles(pixels, shape)
    if len(chosen) > MAX_TILES:
        side = int(np.ceil(np.sqrt(num_covered / MAX_TILES)))
        _draw_cells(canvas, table, rows, pixels, side)
    else:
        _draw_tiles(canvas, table, rows[chosen], pixels[chosen])
    return canvas


def _to_pixels(frame: MapFrame, boxes: Floats64, shape: tuple[int, int]) -> Ints:
    """Return boxes in metres as boxes[N, 4] in pixels: left, right, top, bottom; rows go down.

    They are widened to whole pixels: between tiles whose edges meet no seam stays open.
    """
    scale = shape[1] / (2 * frame.half_width_m)
    left, right, bottom, top = boxes.T
    low = np.stack([left + frame.half_width_m, frame.half_height_m - top], axis=1)
    high = np.stack([right + frame.half_width_m, frame.half_height_m - bottom], axis=1)
    edges = np.stack([np.floor(low * scale + EDGE), np.ceil(high * scale - EDGE)], axis=2)
    return np.asarray(edges.reshape(-1, 4), np.int64)


def _clip(box: Ints, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Return the rows and columns of a box that lie on a canvas."""
    left, right, top, bottom = (int(edge) for edge in box)
    rows = slice(max(top, 0), max(min(bottom, shape[0]), 0))
    return rows, slice(max(left, 0), max(min(right, shape[1]), 0))


def _choose_tiles(pixels: Ints, shape: tuple[int, int]) -> tuple[Ints, int]:
    """Choose the tiles that together cover the ground, each much that others do not.

    Returns their numbers, and how many pixels they cover.
    """
    is_covered = np.zeros(shape, dtype=bool)
    is_chosen = np.zeros(len(pixels), dtype=bool)
    for least_new in LEAST_NEW:
        for at, box in enumerate(pixels):
            seen = is_covered[_clip(box, shape)]
            if is_chosen[at] or not seen.size:
                continue
            if seen.size - np.count_nonzero(seen) >= least_new * seen.size:
                seen[:] = True
                is_chosen[at] = True
    return np.flatnonzero(is_chosen), int(np.count_nonzero(is_covered))


def _read_tiles(table: ImageTable, rows: Ints) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield the number and the pixels [h, w, 3] of each tile, until the time is over."""
    until = time.monotonic() + MAX_SECONDS
    for at, image in enumerate(load_raws(table, rows.tolist())):
        if not isinstance(image, BadImageError):
            yield at, image.permute(1, 2, 0).numpy()
        if time.monotonic() > until:
            return


def _shrink(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize pixels [h, w, 3]."""
    import torch

    resized = resize(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1), size)
    return np.asarray(resized.permute(1, 2, 0).numpy())


def _draw_tiles(canvas: Canvas, table: ImageTable, rows: Ints, pixels: Ints) -> None:
    """Draw tiles at their boxes in pixels; what is drawn already stays."""
    for at, image in _read_tiles(table, rows):
        left, right, top, bottom = pixels[at].tolist()
        side = max(right - left, bottom - top)
        if min(right - left, bottom - top) < 1 or side > LARGEST * max(canvas.shape):
            continue
        tile = _shrink(image, (bottom - top, right - left))
        place = _clip(pixels[at], canvas.shape)
        part = canvas[place]
        shown = tile[
            place[0].start - top : place[0].stop - top,
            place[1].start - left : place[1].stop - left,
        ]
        is_free: Bools = part[..., 3] == 0
        part[is_free, :3] = shown[is_free]
        part[..., 3] = 255


def _draw_cells(canvas: Canvas, table: ImageTable, rows: Ints, pixels: Ints, side: int) -> None:
    """Draw the mean color of a tile into each cell of the canvas that holds the middle of one.

    side: of a cell, pixels.
    """
    height, width = canvas.shape[:2]
    middle_x = pixels[:, :2].mean(axis=1) / side
    middle_y = pixels[:, 2:].mean(axis=1) / side
    num_columns = int(np.ceil(width / side))
    num_rows = int(np.ceil(height / side))
    on_map = (middle_x >= 0) & (middle_x < num_columns)
    on_map &= (middle_y >= 0) & (middle_y < num_rows)
    candidates = np.flatnonzero(on_map)
    cell = middle_y[candidates].astype(np.int64) * num_columns
    cell += middle_x[candidates].astype(np.int64)
    from_middle = np.hypot(middle_x[candidates] % 1 - 0.5, middle_y[candidates] % 1 - 0.5)
    order = np.lexsort((from_middle, cell))
    cells, first = np.unique(cell[order], return_index=True)
    chosen = candidates[order[first]]
    colors = np.zeros((num_rows * num_columns, 4), np.uint8)
    # shuffled: where the time ends, what is missing is spread over the map
    shuffled = np.random.default_rng(0).permutation(len(chosen))
    for at, image in _read_tiles(table, rows[chosen[shuffled]]):
        colors[cells[shuffled[at]]] = [*image.reshape(-1, 3).mean(axis=0), 255]
    grid = colors.reshape(num_rows, num_columns, 4)
    at_row = np.minimum(np.arange(height) / side, num_rows - 1).astype(np.int64)
    at_column = np.minimum(np.arange(width) / side, num_columns - 1).astype(np.int64)
    canvas[:] = grid[at_row[:, None], at_column]
