"""Shift and scale query pictures in training, so that a query is not centred on its tile.

A window of the picture is kept: its side over the picture's is drawn from augment.query_scale, its
centre lies off the picture's by a draw within augment.query_shift. Ground beyond the border is
mirrored. It happens before anything else, for the loader's own augmentation and that on a device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from s4g_ray.config.data_schema import AugmentConfig

_SHIFT_STREAM = 0x736869  # separates these draws from others of the same (seed, epoch, query)


class Window(NamedTuple):
    """The part of a picture that is kept, in shares of its height and width."""

    down: float  # of its centre from the picture's
    right: float
    side: float


def draw_window(cfg: AugmentConfig, key: tuple[int, ...]) -> Window:
    """Draw the window of a query from its key: seed, epoch and query id."""
    rng = np.random.default_rng((*key, _SHIFT_STREAM))
    down, right = rng.uniform(-cfg.query_shift, cfg.query_shift, 2)
    return Window(down, right, rng.uniform(*cfg.query_scale))


def shift_query(image: Tensor, cfg: AugmentConfig, key: tuple[int, ...]) -> Tensor:
    """Return a query's window of uint8 [3, h, w]; the image itself where none is configured.

    Its sides are whole pixels of the stored picture.
    """
    if not cfg.shifts_queries:
        return image
    window = draw_window(cfg, key)
    rows = _list_pixels(image.shape[-2], window.down, window.side)
    columns = _list_pixels(image.shape[-1], window.right, window.side)
    pixels = image.permute(1, 2, 0)  # decoded pixels are interleaved, and stay so
    return pixels[rows[:, None], columns[None]].permute(2, 0, 1)


def _list_pixels(length: int, offset: float, side: float) -> Tensor:
    """Return the pixels of a window along an axis; those beyond the border are mirrored."""
    count = max(1, round(side * length))
    first = round((0.5 + offset) * length - count / 2)
    pixels = torch.arange(first, first + count) % (2 * length)
    return torch.where(pixels < length, pixels, 2 * length - 1 - pixels)
