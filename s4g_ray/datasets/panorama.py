"""Unroll the ground around a point into a panorama.

A panorama's columns are azimuths, growing clockwise to the right, as in a street panorama: the
centre shows the heading. Its rows are distances: the nearest ground at the bottom, the farthest at
the top.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64
from s4g_ray.config.data_schema import Size

Pixels = NDArray[np.uint8]  # [H, W, 3]


def unroll(pixels: Pixels, corners: Floats64, size: Size, heading_deg: float) -> Pixels:
    """Unroll pixels[h, w, 3] around the centre of a square of ground -> [*size, 3].

    corners[2, 2, 2]: column and row in pixels, from the picture's first corner, of the square's
    corners: north-west and north-east, then south-west and south-east. The farthest row ends at
    half the square's side. heading_deg: azimuth of the centre of the columns; the centre lies
    between two columns where their number is even. Samples bilinearly; beyond the picture, its
    outermost pixels go on.
    """
    east, north = polar_grid(size, heading_deg)
    right = (0.5 + 0.5 * east)[..., None]
    down = (0.5 - 0.5 * north)[..., None]
    upper = corners[0, 0] * (1 - right) + corners[0, 1] * right
    lower = corners[1, 0] * (1 - right) + corners[1, 1] * right
    points = upper * (1 - down) + lower * down
    return _sample(pixels, points[..., 0], points[..., 1])


def polar_grid(size: Size, heading_deg: float) -> tuple[Floats64, Floats64]:
    """Return the ground of a panorama's pixels: east[H, W] and north[H, W], of a radius of 1."""
    height, width = size
    distance = 1 - (np.arange(height)[:, None] + 0.5) / height
    azimuth = np.radians(heading_deg + 360 * ((np.arange(width) + 0.5) / width - 0.5))
    return distance * np.sin(azimuth), distance * np.cos(azimuth)


def _sample(pixels: Pixels, column: Floats64, row: Floats64) -> Pixels:
    """Interpolate pixels[h, w, 3] bilinearly at points [H, W], from the corner of the first."""
    height, width, _ = pixels.shape
    x = np.clip(column - 0.5, 0, width - 1)
    y = np.clip(row - 0.5, 0, height - 1)
    left = np.minimum(x.astype(np.int64), width - 2)
    top = np.minimum(y.astype(np.int64), height - 2)
    u = (x - left)[..., None]
    v = (y - top)[..., None]
    upper = pixels[top, left] * (1 - u) + pixels[top, left + 1] * u
    lower = pixels[top + 1, left] * (1 - u) + pixels[top + 1, left + 1] * u
    rounded = upper * (1 - v) + lower * v + 0.5
    return np.asarray(rounded, np.uint8)
