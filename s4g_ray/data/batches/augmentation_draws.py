"""Draw what augmentation does to an image, apart from doing it.

All draws come from the given generator, in an order that does not depend on what the images show.
The loader's own augmentation and that on the device take the same draws. With cfg.published they
are those of the published method, by batches/published_draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s4g_ray.config.data_schema import AugmentConfig, Size
from s4g_ray.data.batches import published_draws
from s4g_ray.data.batches.published_draws import View

Operation = Literal[
    "flip_first",
    "jpeg",  # quality
    "brightness",  # factor
    "contrast",  # factor
    "saturation",  # factor
    "hue",  # share of the circle
    "blur",  # sigma in pixels
    "sharpen",  # factor
    "filter",  # weights of the square of pixels around each, row by row
    "grid",  # side of a cell, side of its hole, offsets of rows and columns, in pixels
    "holes",  # top, left, height and width of each hole, in pixels
    "flip",
    "turn_90",  # counter-clockwise
    "turn_180",
    "turn_270",
    "roll",  # columns to the right
    "view",  # first column that is seen and the one after the last: others become black
]
# In the order in which they are applied, but for the colours: each image has an order of its own.
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
COLORS: tuple[Operation, ...] = ("brightness", "contrast", "saturation", "hue")
TURNS: tuple[Operation, ...] = ("turn_90", "turn_180", "turn_270")
# The operations on one image, each with its values as listed above; colours in their order.
ImageDraws = dict[Operation, tuple[float, ...]]
MAX_HOLES = 25
_HOLE = 0.4  # of the side of a grid's cell


def draw_pair(
    cfg: AugmentConfig, rng: np.random.Generator, query_size: Size, reference_size: Size
) -> tuple[ImageDraws, ImageDraws]:
    """Draw the augmentation of a query and its reference, given their sizes for the encoder.

    Raises ValueError if a view that is not square would be turned.
    """
    flips_first = draw_first_flip(cfg, rng)
    query = _draw_view(cfg, rng, query_size, "query", flips_first=flips_first)
    reference = _draw_view(cfg, rng, reference_size, "reference", flips_first=flips_first)
    is_flipped, turns = draw_geometry(cfg, rng, may_turn=cfg.rotate != "none")
    if is_flipped:
        query["flip"] = ()
        reference["flip"] = ()
    if turns and cfg.rotate in ("planar", "query"):
        _turn(query, turns, query_size)
    if turns and cfg.rotate == "panorama":
        query["roll"] = (panorama_shift(turns, query_size[1]),)
    if turns and cfg.rotate != "query":
        _turn(reference, turns, reference_size)
    return query, reference


def draw_reference(cfg: AugmentConfig, rng: np.random.Generator, size: Size) -> ImageDraws:
    """Draw the augmentation of a reference without a query. Raises ValueError as draw_pair does."""
    flips_first = draw_first_flip(cfg, rng)
    reference = _draw_view(cfg, rng, size, "reference", flips_first=flips_first)
    is_flipped, turns = draw_geometry(cfg, rng, may_turn=cfg.rotate not in ("none", "query"))
    if is_flipped:
        reference["flip"] = ()
    if turns:
        _turn(reference, turns, size)
    return reference


def add_field_of_view(draws: ImageDraws, turn: int, view: tuple[int, int] | None) -> None:
    """Roll an image by so many columns to the right, after everything else, then show a view.

    view: its first column and the one after its last; None: nothing becomes black.
    """
    if turn:
        (before,) = draws.get("roll", (0,))
        draws["roll"] = (before + turn,)
    if view is not None:
        draws["view"] = view


def _turn(draws: ImageDraws, turns: int, size: Size) -> None:
    check_square(size)
    draws[TURNS[turns - 1]] = ()


def check_square(size: Sequence[int]) -> None:
    """Raise ValueError if a height and width, which are to be turned by 90 degrees, differ."""
    if size[0] != size[1]:
        raise ValueError("rotation by 90 degrees needs square images; set augment.rotate=none")


def panorama_shift(turns: int, width: int) -> int:
    """Return by how many columns a panorama rolls to the right while its tile turns.

    The tile turns counter-clockwise by `turns` * 90 degrees; rounded where 4 does not divide the
    width.
    """
    return -round(turns * width / 4)


def _draw_view(
    cfg: AugmentConfig, rng: np.random.Generator, size: Size, view: View, *, flips_first: bool
) -> ImageDraws:
    draws: ImageDraws = {}
    if flips_first:
        draws["flip_first"] = ()
    quality = draw_quality(cfg, rng)
    if quality is not None:
        draws["jpeg"] = (quality,)
    draws.update(draw_changes(cfg, rng, size, view))
    return draws


def draw_first_flip(cfg: AugmentConfig, rng: np.random.Generator) -> bool:
    """Draw whether images are flipped before all else; only the published form does so."""
    return cfg.published is True and rng.random() < cfg.flip_probability


def draw_quality(cfg: AugmentConfig, rng: np.random.Generator) -> int | None:
    """Draw the quality at which an image is compressed as JPEG; None: it is not."""
    if rng.random() < cfg.jpeg_probability:
        return int(rng.integers(cfg.jpeg_quality[0], cfg.jpeg_quality[1] + 1))
    return None


def draw_changes(
    cfg: AugmentConfig, rng: np.random.Generator, size: Size, view: View
) -> ImageDraws:
    """Draw colours, blur or sharpening, and dropout of an image of a height and width."""
    draws: ImageDraws = {}
    if rng.random() < cfg.color_probability:
        draws.update(_draw_colors(cfg, rng))
    if rng.random() < cfg.blur_probability:
        draws.update(_draw_blur(cfg, rng))
    if rng.random() < cfg.dropout_probability:
        draws.update(_draw_dropout(cfg, rng, size, view))
    return draws


def _draw_colors(cfg: AugmentConfig, rng: np.random.Generator) -> ImageDraws:
    factors = 1 + rng.uniform(-cfg.color_strength, cfg.color_strength, 3)
    hue = rng.uniform(-cfg.color_strength, cfg.color_strength)
    values = (*factors.tolist(), hue)
    order = published_draws.draw_order(rng) if cfg.published else range(len(COLORS))
    return {COLORS[i]: (values[i],) for i in order}


def _draw_blur(cfg: AugmentConfig, rng: np.random.Generator) -> ImageDraws:
    """Draw blur or sharpening."""
    blurs = rng.random() < 0.5
    if cfg.published:
        return {"filter": published_draws.draw_filter(rng, blurs=blurs)}
    if blurs:
        return {"blur": (rng.uniform(0.3, 1.2),)}
    return {"sharpen": (1 + rng.uniform(0.2, 1.0),)}


def _draw_dropout(
    cfg: AugmentConfig, rng: np.random.Generator, size: Size, view: View
) -> ImageDraws:
    """Draw the holes of a grid, or some anywhere."""
    in_grid = rng.random() < 0.5
    if cfg.published and in_grid:
        return {"grid": published_draws.find_grid(size[1], cfg.rotate, view)}
    if cfg.published:
        return {"holes": published_draws.draw_holes(rng, size)}
    if in_grid:
        return {"grid": draw_grid(rng, size[0])}
    return {"holes": draw_squares(rng, size)}


def draw_geometry(
    cfg: AugmentConfig, rng: np.random.Generator, *, may_turn: bool
) -> tuple[bool, int]:
    """Draw whether images are flipped last, and by how many quarters they are turned (0..3)."""
    is_flipped = not cfg.published and rng.random() < cfg.flip_probability
    turns = int(rng.integers(1, 4))
    if may_turn and rng.random() < cfg.rotate_probability:
        return is_flipped, turns
    return is_flipped, 0


def draw_squares(rng: np.random.Generator, size: Size) -> tuple[int, ...]:
    """Draw 10..25 squares of 10..20 % of the height, as holes: top, left, height, width of each."""
    height, width = size
    squares: list[int] = []
    for _ in range(int(rng.integers(10, MAX_HOLES + 1))):
        side = max(1, round(rng.uniform(0.1, 0.2) * height))
        top = int(rng.integers(0, max(height - side, 0) + 1))
        left = int(rng.integers(0, max(width - side, 0) + 1))
        squares.extend((top, left, side, side))
    return tuple(squares)


def draw_grid(rng: np.random.Generator, height: int, ratio: float = _HOLE) -> tuple[int, ...]:
    """Draw a regular grid: side of a cell, side of its hole, offsets of rows and columns.

    The hole's side is `ratio` of the cell's.
    """
    cell = max(2, round(rng.uniform(0.125, 0.25) * height))
    hole = max(1, round(ratio * cell))
    return cell, hole, int(rng.integers(cell)), int(rng.integers(cell))


def gaussian_weights(sigma: float) -> tuple[float, float, float]:
    """Return the weights of pixels at distances 2, 1 and 0; those of all five add up to 1."""
    near = math.exp(-0.5 * (1 / sigma) ** 2)
    far = math.exp(-0.5 * (2 / sigma) ** 2)
    total = 1 + 2 * near + 2 * far
    return far / total, near / total, 1 / total


def _pad_holes(*holes: float) -> tuple[float, ...]:
    return holes + (0.0,) * (4 * MAX_HOLES - len(holes))


def _and_rest(share: float) -> tuple[float, float]:
    return share, 1 - share


# Computed here in double precision, as the loader's own augmentation does: values of an operation
# -> the numbers that the device needs. Other operations need their values.
_CONVERSIONS: Mapping[Operation, Callable[..., tuple[float, ...]]] = {
    "contrast": _and_rest,
    "saturation": _and_rest,
    "hue": lambda share: (6 * share,),
    "blur": gaussian_weights,
    "sharpen": lambda factor: (factor - 1,),
    "holes": _pad_holes,
}


@dataclass(frozen=True)
class BatchDraws:
    """The augmentation of a batch of images of one view, in one tensor: it moves in one copy.

    packed: float32; for each step the row numbers of its k images, then their values [k, v].
    Numbers up to 2**24 are exact. steps: (operation, k, v), in the order in which they are applied;
    known without asking the device. width: the columns that are kept at last, in the middle.
    """

    packed: Tensor
    steps: tuple[tuple[Operation, int, int], ...]
    width: int

    @classmethod
    def from_images(cls, images: Sequence[ImageDraws], width: int) -> Self:
        """Pack the draws of the images of a batch; those of an empty slot are empty."""
        parts: list[NDArray[np.float64]] = [np.zeros(0)]
        steps: list[tuple[Operation, int, int]] = []
        for operation, rows in _list_steps(images):
            convert = _CONVERSIONS.get(operation, _keep_values)
            values = {row: convert(*images[row][operation]) for row in rows}
            for length in sorted({len(of_row) for of_row in values.values()}):  # filters differ
                alike = [row for row in rows if len(values[row]) == length]
                steps.append((operation, len(alike), length))
                parts.append(np.array(alike, dtype=np.float64))
                parts.append(np.array([values[row] for row in alike], dtype=np.float64).ravel())
        packed = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        return cls(packed, tuple(steps), width)

    def move(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the draws with their tensor changed, for example moved to a device."""
        return replace(self, packed=change(self.packed))

    def unpack(self) -> Iterator[tuple[Operation, Tensor, Tensor]]:
        """Yield operation, rows int64 [k] and values float32 [k, v] of each step, in order."""
        start = 0
        for operation, num_images, num_values in self.steps:
            middle = start + num_images
            end = middle + num_images * num_values
            rows = self.packed[start:middle].long()
            yield operation, rows, self.packed[middle:end].view(num_images, num_values)
            start = end


def _list_steps(images: Sequence[ImageDraws]) -> Iterator[tuple[Operation, list[int]]]:
    """Yield operations in the order in which they are applied, with the rows of their images.

    Colours take up to sixteen steps: first those that come first in their image, and so on.
    """
    orders = [[name for name in draws if name in COLORS] for draws in images]
    for operation in OPERATIONS:
        if operation not in COLORS:
            rows = [row for row, draws in enumerate(images) if operation in draws]
            if rows:
                yield operation, rows
        if operation != COLORS[0]:
            continue
        for place in range(len(COLORS)):
            for color in COLORS:
                rows = [row for row, order in enumerate(orders) if color in order[place:][:1]]
                if rows:
                    yield color, rows


def _keep_values(*values: float) -> tuple[float, ...]:
    return values
