"""Resample a window of source pixels into a tile, compiled.

The map from tile to source is given at a grid of points and bilinear between them: one cell of
the grid is an affine map for the small tiles that are usual; a large tile in a strongly curved
projection has more.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64

Pixels = NDArray[np.uint8]  # [H, W, 3]
Mask = NDArray[np.uint8]  # [H, W]: 1 where a pixel holds data
BITS = 11  # of a bilinear weight on each axis
ONE = 1 << BITS


def resample(
    window: Pixels, valid: Mask, points: Floats64, samples: int, tile: Pixels, filled: Mask
) -> int:
    """Fill the pixels of tile[P, P, 3] that are not filled[P, P] yet; return how many were filled.

    window[h, w, 3], valid[h, w]: the source; valid may be [0, 0] where all pixels hold data.
    points[G + 1, G + 1, 2]: column and row in the window, in pixels from its corner, of a regular
    grid of points from the tile's first corner to its last. samples: a pixel of the tile is the
    mean of samples * samples points (2 where the tile is coarser than the window). A pixel is
    filled where its centre lies on a valid pixel of the window; invalid ones add nothing.
    """
    if not len(window):
        return 0
    return int(_resample(window, valid, points, samples, tile, filled))


@numba.njit(cache=True, nogil=True)
def _resample(
    window: Pixels, valid: Mask, points: Floats64, samples: int, tile: Pixels, filled: Mask
) -> int:
    height, width, _ = window.shape
    size = tile.shape[0]
    cells = points.shape[0] - 1
    masked = valid.shape[0] > 0
    count = 0
    for i in range(size):
        for cell in range(cells):
            first = (size * cell + cells - 1) // cells
            last = (size * (cell + 1) + cells - 1) // cells
            v = (i + 0.5) / size * cells
            k = min(int(v), cells - 1)
            v -= k
            x_a = points[k, cell, 0] * (1 - v) + points[k + 1, cell, 0] * v
            y_a = points[k, cell, 1] * (1 - v) + points[k + 1, cell, 1] * v
            x_b = points[k, cell + 1, 0] * (1 - v) + points[k + 1, cell + 1, 0] * v
            y_b = points[k, cell + 1, 1] * (1 - v) + points[k + 1, cell + 1, 1] * v
            x_step = (x_b - x_a) / size * cells
            y_step = (y_b - y_a) / size * cells
            x_0 = x_a + x_step * (0.5 - size * cell / cells)
            y_0 = y_a + y_step * (0.5 - size * cell / cells)
            # of one row of the tile, on the grid's own axis
            x_down = (points[k + 1, cell, 0] - points[k, cell, 0]) / size * cells
            y_down = (points[k + 1, cell, 1] - points[k, cell, 1]) / size * cells
            if not (np.isfinite(x_0 + x_step) and np.isfinite(y_0 + y_step)):
                continue
            for j in range(first, last):
                if filled[i, j]:
                    continue
                x = x_0 + x_step * j
                y = y_0 + y_step * j
                if x < 0 or y < 0 or x >= width or y >= height:
                    continue
                if masked and not valid[int(y), int(x)]:
                    continue
                filled[i, j] = 1
                count += 1
                if samples == 1 and not masked and _sample(window, x, y, tile[i, j]):
                    continue
                _average(window, valid, x, y, (x_step, y_step, x_down, y_down), samples, tile[i, j])
    return count


@numba.njit(cache=True, nogil=True, inline="always")
def _sample(window: Pixels, x: float, y: float, pixel: NDArray[np.uint8]) -> bool:
    """Interpolate inside the window, in whole numbers. Returns False at its edge."""
    x_fixed = np.int64((x - 0.5) * ONE + 0.5)
    y_fixed = np.int64((y - 0.5) * ONE + 0.5)
    left = x_fixed >> BITS
    top = y_fixed >> BITS
    if left < 0 or top < 0 or left + 1 >= window.shape[1] or top + 1 >= window.shape[0]:
        return False
    u = x_fixed & (ONE - 1)
    v = y_fixed & (ONE - 1)
    for c in range(3):
        upper = window[top, left, c] * (ONE - u) + window[top, left + 1, c] * u
        lower = window[top + 1, left, c] * (ONE - u) + window[top + 1, left + 1, c] * u
        value = upper * (ONE - v) + lower * v
        pixel[c] = np.uint8((value + (1 << (2 * BITS - 1))) >> (2 * BITS))
    return True


@numba.njit(cache=True, nogil=True)
def _average(
    window: Pixels,
    valid: Mask,
    x: float,
    y: float,
    steps: tuple[float, float, float, float],
    samples: int,
    pixel: NDArray[np.uint8],
) -> None:
    """Average samples * samples interpolated points over the valid pixels around them."""
    height, width, _ = window.shape
    masked = valid.shape[0] > 0
    x_step, y_step, x_down, y_down = steps
    total = 0.0
    red = 0.0
    green = 0.0
    blue = 0.0
    for a in range(samples):
        for b in range(samples):
            across = (b + 0.5) / samples - 0.5
            down = (a + 0.5) / samples - 0.5
            px = x + across * x_step + down * x_down - 0.5
            py = y + across * y_step + down * y_down - 0.5
            left = int(np.floor(px))
            top = int(np.floor(py))
            for corner in range(4):
                column = left + corner % 2
                row = top + corner // 2
                weight = (1 - abs(px - column)) * (1 - abs(py - row))
                column = min(max(column, 0), width - 1)
                row = min(max(row, 0), height - 1)
                if masked and not valid[row, column]:
                    continue
                total += weight
                red += weight * window[row, column, 0]
                green += weight * window[row, column, 1]
                blue += weight * window[row, column, 2]
    if total <= 0:
        column = int(x)
        row = int(y)
        pixel[0] = window[row, column, 0]
        pixel[1] = window[row, column, 1]
        pixel[2] = window[row, column, 2]
        return
    pixel[0] = np.uint8(red / total + 0.5)
    pixel[1] = np.uint8(green / total + 0.5)
    pixel[2] = np.uint8(blue / total + 0.5)
