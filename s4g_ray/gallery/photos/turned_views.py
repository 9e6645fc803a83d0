"""Turn a photo of unknown orientation: an overhead view rotates, a panorama shifts."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.data.images import Pixels

ViewKind = Literal["overhead", "panorama"]
PANORAMA_ASPECT = 1.75  # width by height of an encoder's input, from which on it is a panorama


def find_view_kind(data: DataConfig) -> ViewKind:
    """Return what a model's queries are, by their preprocessing.

    Panoramas are turned by a heading, cut to a field of view, or wide.
    """
    height, width = data.query_size
    if data.query_heading != "as_is" or data.fov_range[0] < 360:
        return "panorama"
    return "panorama" if width >= PANORAMA_ASPECT * height else "overhead"


def list_turns(num_turns: int) -> list[float]:
    """Return evenly spaced angles in degrees, 0 first."""
    return [360 * i / num_turns for i in range(num_turns)]


def turn_photo(pixels: Pixels, degrees: float, kind: ViewKind) -> Pixels:
    """Turn pixels[H, W, 3] to what they would show with north at the top or in the centre.

    degrees: the azimuth of an overhead photo's upper edge, which is rotated clockwise by it; or
    that of a panorama's centre column, as data.images.turn_panorama. Corners that a rotation leaves
    empty are filled by reflection. Quarter turns swap the sides of a photo; others keep its size.
    """
    degrees %= 360
    if kind == "panorama":
        return np.roll(pixels, round(degrees / 360 * pixels.shape[1]), axis=1)
    if degrees % 90 == 0:
        return np.ascontiguousarray(np.rot90(pixels, -int(degrees // 90)))
    height, width = pixels.shape[:2]
    reach = math.hypot(height, width)
    down = math.ceil((reach - height) / 2) + 1
    across = math.ceil((reach - width) / 2) + 1
    padded = np.pad(pixels, ((down, down), (across, across), (0, 0)), mode="reflect")
    turned = np.asarray(Image.fromarray(padded).rotate(-degrees, Image.Resampling.BILINEAR))
    return np.ascontiguousarray(turned[down : down + height, across : across + width])
