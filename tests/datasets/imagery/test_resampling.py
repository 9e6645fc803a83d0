"""Resampling against bilinear interpolation in float64, a pixel at a time."""

from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.arrays import Floats64
from s4g_ray.datasets.imagery.resampling import resample

PIXELS = 96
ALL_VALID = np.empty((0, 0), np.uint8)
CORNERS = np.array([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]])


def interpolate(window: Floats64, x: Floats64, y: Floats64) -> Floats64:
    """Return the values[N, 3] at columns x[N] and rows y[N], edges repeated; NaN outside."""
    height, width, _ = window.shape
    left = np.floor(x - 0.5).astype(int)
    top = np.floor(y - 0.5).astype(int)
    out = np.zeros((len(x), 3))
    for column in (left, left + 1):
        for row in (top, top + 1):
            weight = (1 - np.abs(x - 0.5 - column)) * (1 - np.abs(y - 0.5 - row))
            value = window[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
            out += weight[:, None] * value
    out[(x < 0) | (y < 0) | (x >= width) | (y >= height)] = np.nan
    return out


@pytest.mark.parametrize("turn", [0.0, -1.0, 3.0, 40.0, 180.0])  # degrees
@pytest.mark.parametrize(
    ("scale", "start"),  # window pixels a tile's pixel; two of the tiles end outside of the window
    [(0.6, 50.0), (0.95, 3.7), (1.0, 50.0), (1.0001, -20.2), (1.1, 3.7)],
)
def test_a_tile_is_interpolated_within_a_grey_level(
    turn: float, scale: float, start: float
) -> None:
    rng = np.random.default_rng(0)
    window = rng.integers(0, 2, (140, 160, 3), dtype=np.uint8) * np.uint8(255)
    angle = np.radians(turn)
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle = start + PIXELS * scale / 2
    points = (CORNERS - 0.5) @ axes * PIXELS * scale + middle
    tile = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    filled = np.zeros((PIXELS, PIXELS), np.uint8)
    count = resample(window, ALL_VALID, points, 1, tile, filled)
    centres = (np.arange(PIXELS) + 0.5) / PIXELS - 0.5
    across, down = np.meshgrid(centres, centres)
    at = np.stack([across.ravel(), down.ravel()], axis=1) @ axes * PIXELS * scale + middle
    wanted = interpolate(window.astype(np.float64), *at.T)
    known = np.isfinite(wanted[:, 0])
    assert count == filled.sum() == known.sum() > 1000
    assert np.array_equal(filled.ravel() > 0, known)
    assert np.abs(tile.reshape(-1, 3)[known] - wanted[known]).max() < 1.6
