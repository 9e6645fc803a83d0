"""Draw what augmentation does to an image, apart from doing it.

All draws come from the given generator, in an order that does not depend on what the images show.
The loader's own augmentation and that on the device take the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s4g_ray.config.data_schema import AugmentConfig, Size

Operation = Literal[
    "jpeg",  # quality
    "color",  # factors of brightness, contrast and saturation, share of the hue's circle
    "blur",  # sigma in pixels
    "sharpen",  # factor
    "grid",  # side of a cell, side of its hole, offsets of rows and columns, in pixels
    "squares",  # top, left and side of each square, in pixels
    "flip",
    "turn_90",  # counter-clockwise
    "turn_180",
    "turn_270",
    "roll",  # columns to the right
    "view",  # first column that is seen and the one after the last: others become black
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)  # in the order in which they are applied
TURNS: tuple[Operation, ...] = ("turn_90", "turn_180", "turn_270")
# The operations on one image, each with its values as listed above.
ImageDraws = dict[Operation, tuple[float, ...]]
MAX_SQUARES = 25
_HOLE = 0.4  # of the side of a grid's cell


def draw_pair(
    cfg: AugmentConfig, rng: np.random.Generator, query_size: Size, reference_size: Size
) -> tuple[ImageDraws, ImageDraws]:
    """Draw the augmentation of a query and its reference, given their sizes for the encoder.

    Raises ValueError if a view that is not square would be turned.
    """
    query = _draw_view(cfg, rng, query_size)
    reference = _draw_view(cfg, rng, reference_size)
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
    reference = _draw_view(cfg, rng, size)
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


def _draw_view(cfg: AugmentConfig, rng: np.random.Generator, size: Size) -> ImageDraws:
    draws: ImageDraws = {}
    quality = draw_quality(cfg, rng)
    if quality is not None:
        draws["jpeg"] = (quality,)
    draws.update(draw_changes(cfg, rng, size))
    return draws


def draw_quality(cfg: AugmentConfig, rng: np.random.Generator) -> int | None:
    """Draw the quality at which an image is compressed as JPEG; None: it is not."""
    if rng.random() < cfg.jpeg_probability:
        return int(rng.integers(cfg.jpeg_quality[0], cfg.jpeg_quality[1] + 1))
    return None


def draw_changes(cfg: AugmentConfig, rng: np.random.Generator, size: Size) -> ImageDraws:
    """Draw colour, blur or sharpening, and dropout of an image of a height and width."""
    draws: ImageDraws = {}
    if rng.random() < cfg.color_probability:
        strength = cfg.color_strength
        brightness, contrast, saturation = 1 + rng.uniform(-strength, strength, 3)
        hue = rng.uniform(-strength, strength)
        draws["color"] = (brightness, contrast, saturation, hue)
    if rng.random() < cfg.blur_probability:
        if rng.random() < 0.5:
            draws["blur"] = (rng.uniform(0.3, 1.2),)
        else:
            draws["sharpen"] = (1 + rng.uniform(0.2, 1.0),)
    if rng.random() < cfg.dropout_probability:
        if rng.random() < 0.5:
            draws["grid"] = draw_grid(rng, size[0])
        else:
            draws["squares"] = draw_squares(rng, size)
    return draws


def draw_geometry(
    cfg: AugmentConfig, rng: np.random.Generator, *, may_turn: bool
) -> tuple[bool, int]:
    """Draw whether images are flipped, and by how many quarters they are turned (0..3)."""
    is_flipped = rng.random() < cfg.flip_probability
    turns = int(rng.integers(1, 4))
    if may_turn and rng.random() < cfg.rotate_probability:
        return is_flipped, turns
    return is_flipped, 0


def draw_squares(rng: np.random.Generator, size: Size) -> tuple[int, ...]:
    """Draw 10..25 squares of 10..20 % of the height: top, left and side of each."""
    height, width = size
    squares: list[int] = []
    for _ in range(int(rng.integers(10, MAX_SQUARES + 1))):
        side = max(1, round(rng.uniform(0.1, 0.2) * height))
        top = int(rng.integers(0, max(height - side, 0) + 1))
        left = int(rng.integers(0, max(width - side, 0) + 1))
        squares.extend((top, left, side))
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


def _color_terms(
    brightness: float, contrast: float, saturation: float, hue: float
) -> tuple[float, ...]:
    return brightness, contrast, 1 - contrast, saturation, 1 - saturation, 6 * hue


def _pad_squares(*squares: float) -> tuple[float, ...]:
    return squares + (0.0,) * (3 * MAX_SQUARES - len(squares))


# Computed here in double precision, as the loader's own augmentation does: values of an operation
# -> the numbers that the device needs. Other operations need their values.
_CONVERSIONS: Mapping[Operation, Callable[..., tuple[float, ...]]] = {
    "color": _color_terms,
    "blur": gaussian_weights,
    "sharpen": lambda factor: (factor - 1,),
    "squares": _pad_squares,
}


@dataclass(frozen=True)
class BatchDraws:
    """The augmentation of a batch of images of one view, in one tensor: it moves in one copy.

    packed: float32; for each operation the row numbers of its k images, then their values [k, v].
    Numbers up to 2**24 are exact. counts: (k, v) of each of OPERATIONS; known without asking the
    device. width: the columns that are kept at last, in the middle.
    """

    packed: Tensor
    counts: tuple[tuple[int, int], ...]
    width: int

    @classmethod
    def from_images(cls, images: Sequence[ImageDraws], width: int) -> Self:
        """Pack the draws of the images of a batch; those of an empty slot are empty."""
        parts: list[NDArray[np.float64]] = []
        counts: list[tuple[int, int]] = []
        for operation in OPERATIONS:
            convert = _CONVERSIONS.get(operation, _keep_values)
            rows = [row for row, draws in enumerate(images) if operation in draws]
            values = [convert(*images[row][operation]) for row in rows]
            counts.append((len(rows), len(values[0]) if values else 0))
            parts.append(np.array(rows, dtype=np.float64))
            parts.append(np.array(values, dtype=np.float64).ravel())
        packed = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        return cls(packed, tuple(counts), width)

    def move(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the draws with their tensor changed, for example moved to a device."""
        return replace(self, packed=change(self.packed))

    def unpack(self) -> dict[Operation, tuple[Tensor, Tensor]]:
        """Return rows int64 [k] and values float32 [k, v] of each operation that has an image."""
        found: dict[Operation, tuple[Tensor, Tensor]] = {}
        start = 0
        for operation, (num_images, num_values) in zip(OPERATIONS, self.counts, strict=True):
            middle = start + num_images
            end = middle + num_images * num_values
            if num_images:
                rows = self.packed[start:middle].long()
                found[operation] = (rows, self.packed[middle:end].view(num_images, num_values))
            start = end
        return found


def _keep_values(*values: float) -> tuple[float, ...]:
    return values
