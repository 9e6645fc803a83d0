"""Draw retrievals as pictures: a query and the references found for it, in one row."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from s4g_ray.pipeline.report.examples import Example, Tile

BORDER = 3  # pixels
CAPTION = 14  # pixels, below a tile
GAP = 6  # pixels, between tiles
# border by the kind of a tile: right and wrong references
COLORS = {"right": "#16a34a", "wrong": "#dc2626"}
OTHER_COLOR = "#6b7280"


@dataclass(frozen=True)
class Picture:
    """A picture with its title."""

    title: str
    image: Image.Image


def draw_retrievals(examples: Iterable[Example]) -> list[Picture]:
    """Draw each example: its tiles from left to right, right references green, wrong ones red."""
    return [Picture(example.title, _draw_row(example.tiles)) for example in examples]


def _draw_row(tiles: list[Tile]) -> Image.Image:
    images = [_decode(tile) for tile in tiles]
    height = max(image.height for image in images) + 2 * BORDER
    width = sum(image.width + 2 * BORDER + GAP for image in images) + GAP
    row = Image.new("RGB", (width, height + CAPTION + 2 * GAP), "white")
    draw = ImageDraw.Draw(row)
    left = GAP
    for tile, image in zip(tiles, images, strict=True):
        right = left + image.width + 2 * BORDER
        box = (left, GAP, right - 1, GAP + image.height + 2 * BORDER - 1)
        draw.rectangle(box, fill=COLORS.get(tile.kind, OTHER_COLOR))
        row.paste(image, (left + BORDER, GAP + BORDER))
        draw.text((left, GAP + height), tile.caption, fill="black")
        left = right + GAP
    return row


def _decode(tile: Tile) -> Image.Image:
    """Decode the data URI of a tile."""
    data = base64.b64decode(tile.image.partition(",")[2])
    return Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB")
