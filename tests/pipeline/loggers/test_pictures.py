from __future__ import annotations

import io

import numpy as np
from PIL import Image

from s4g_ray.pipeline.loggers.pictures import BORDER, COLORS, GAP, draw_retrievals
from s4g_ray.pipeline.report.examples import Example, Tile, encode_data_uri


def tile(color: str, kind: str, width: int) -> Tile:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 96), color).save(buffer, "JPEG", quality=100)
    return Tile(encode_data_uri(buffer.getvalue()), "1. 12 m", kind)


def test_tiles_stand_side_by_side_in_borders_of_their_kind() -> None:
    tiles = [tile("blue", "query", 168), tile("yellow", "right", 96), tile("black", "wrong", 96)]
    (picture,) = draw_retrievals([Example("48.0000° N, 2.0000° E", tiles)])
    assert picture.title == "48.0000° N, 2.0000° E"
    pixels = np.asarray(picture.image)
    middle = GAP + BORDER + 48
    left = GAP
    for width, kind, color in (
        (168, "query", (0, 0, 255)),
        (96, "right", (255, 255, 0)),
        (96, "wrong", (0, 0, 0)),
    ):
        if kind in COLORS:
            border = tuple(int(COLORS[kind][at : at + 2], 16) for at in (1, 3, 5))
            assert tuple(pixels[middle, left + 1]) == border
        inside = pixels[middle, left + BORDER + width // 2].astype(int)
        assert np.abs(inside - color).max() < 8
        left += width + 2 * BORDER + GAP
    assert pixels.shape[1] == left
    assert (pixels[-GAP - 14 :, :] < 128).any(), "no caption"
