"""Draw colours, filters and dropout as the published training does.

Source: Sample4Geo (arXiv 2303.11851), whose images are augmented by albumentations 1.3.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from s4g_ray.config.data_schema import Size

View = Literal["query", "reference"]
_BLUR_SIDES = (3, 5, 7)  # pixels
_GROUND_RATIO = 0.5  # of a hole's side in a grid to that of its cell
_OVERHEAD_RATIO = 0.4
_OVERHEAD_QUERIES = ("planar", "reference", "query")  # augment.rotate where both views are overhead


def draw_order(rng: np.random.Generator) -> list[int]:
    """Draw the order in which the four colour operations are applied."""
    order: list[int] = rng.permutation(4).tolist()
    return order


def draw_filter(rng: np.random.Generator, *, blurs: bool) -> tuple[float, ...]:
    """Draw the weights of a filter that blurs, of 3, 5 or 7 pixels a side, or sharpens, of 3."""
    if blurs:
        return _draw_blur(rng)
    alpha = rng.uniform(0.2, 0.5)
    lightness = rng.uniform(0.5, 1.0)
    weights = [-alpha] * 9
    weights[4] = 1 - alpha + alpha * (8 + lightness)
    return tuple(weights)


def _draw_blur(rng: np.random.Generator) -> tuple[float, ...]:
    """Draw a generalised Gaussian of any direction, its weights changed by up to 10 %.

    Its standard deviations are 0.2..1 pixels, its shape 0.5..8 (1: a Gaussian).
    """
    side = int(rng.choice(_BLUR_SIDES))
    deviations = rng.uniform(0.2, 1.0, 2)
    angle = rng.uniform(-np.pi / 2, np.pi / 2)
    shape = rng.uniform(0.5, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, 8.0)
    noise = rng.uniform(0.9, 1.1, (side, side))
    y, x = np.indices((side, side)) - side // 2
    along = (np.cos(angle) * x + np.sin(angle) * y) / deviations[0]
    across = (np.cos(angle) * y - np.sin(angle) * x) / deviations[1]
    weights = np.exp(-0.5 * (along**2 + across**2) ** shape) * noise
    return tuple((weights / weights.sum()).ravel().tolist())


def find_grid(width: int, rotate: str, view: View) -> tuple[int, int, int, int]:
    """Return the grid of a view: side of a cell, side of its hole, offsets of rows and columns.

    Cells are a tenth of the width, and the first hole lies in the corner. Half a cell's side is
    masked in ground images, 0.4 of it in overhead ones. rotate: augment.rotate; it tells whether
    queries are overhead images.
    """
    is_ground = view == "query" and rotate not in _OVERHEAD_QUERIES
    ratio = _GROUND_RATIO if is_ground else _OVERHEAD_RATIO
    cell = max(2, width // 10)
    hole = min(max(1, int(cell * ratio)), cell - 1)
    return cell, hole, 0, 0


def draw_holes(rng: np.random.Generator, size: Size) -> tuple[int, ...]:
    """Draw 10..25 holes: top, left, height and width of each.

    Height and width are drawn independently, 10..20 % of the image's height each.
    """
    height, width = size
    least = max(1, int(0.1 * height))
    most = max(1, int(0.2 * height))
    holes: list[int] = []
    for _ in range(int(rng.integers(10, 26))):
        rows = int(rng.integers(least, most + 1))
        columns = min(int(rng.integers(least, most + 1)), width)
        top = int(rng.integers(height - rows + 1))
        left = int(rng.integers(width - columns + 1))
        holes.extend((top, left, rows, columns))
    return tuple(holes)
