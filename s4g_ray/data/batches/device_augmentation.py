"""Augment a batch of images on any device, each image by draws of its own.

The operations are those of augmentation.py, in their order, but JPEG acts on images that have their
size already. Turns and rolls come last, so dropout and blur see an image as it is stored; so do
flips, but in the published form. Nothing waits for the device: which images an operation changes is
known to the process that loads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from s4g_ray.data.batches.augmentation import clip_and_floor, compute_grey, mean_around, turn_hue
from s4g_ray.data.batches.augmentation_draws import MAX_HOLES, BatchDraws, Operation
from s4g_ray.data.batches.jpeg_simulation import simulate_jpeg

IMAGES_AT_ONCE = 32  # bounds memory: 32 images of 384 x 384 take 57 MB as float32


def augment_batch(images: Tensor, draws: BatchDraws) -> Tensor:
    """Augment uint8 [n, 3, H, W] into uint8 [n, 3, H, draws.width], in a new tensor.

    draws.packed is on the device of the images. Results differ from those of the loader's own
    augmentation by rounding: at most one level an operation, and in few pixels.
    """
    images = images.clone()
    with torch.no_grad(), _full_precision(images.device.type):
        for operation, rows, values in draws.unpack():
            change = _CHANGES[operation]
            parts = torch.split(rows, IMAGES_AT_ONCE)
            for part, its_values in zip(parts, torch.split(values, IMAGES_AT_ONCE), strict=True):
                changed = change(images.index_select(0, part), its_values)
                images.index_copy_(0, part, changed)
    left = (images.shape[-1] - draws.width) // 2
    return images[..., left : left + draws.width]


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Turn autocast off, which would halve the precision of matrix products."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _compress(images: Tensor, values: Tensor) -> Tensor:
    return simulate_jpeg(images, values[:, 0])


def _change_brightness(images: Tensor, values: Tensor) -> Tensor:
    factor = values.view(-1, 1, 1, 1)
    return clip_and_floor(images.float().mul_(factor)).to(torch.uint8)


def _change_contrast(images: Tensor, values: Tensor) -> Tensor:
    """Change contrast as augmentation.change_colors does. values: factor, 1 - factor."""
    factor, rest = values.view(-1, 2, 1, 1, 1).unbind(1)
    pixels = images.float()
    mean = compute_grey(pixels).mean((1, 2)).view(-1, 1, 1, 1)
    return clip_and_floor(pixels.mul_(factor).add_(rest * mean)).to(torch.uint8)


def _change_saturation(images: Tensor, values: Tensor) -> Tensor:
    """Change saturation as augmentation.change_colors does. values: factor, 1 - factor."""
    factor, rest = values.view(-1, 2, 1, 1, 1).unbind(1)
    pixels = images.float()
    grey = compute_grey(pixels)[:, None]
    return clip_and_floor(pixels.mul_(factor).addcmul_(grey, rest)).to(torch.uint8)


def _change_hue(images: Tensor, values: Tensor) -> Tensor:
    """Turn the hue. values: sixths of the circle."""
    turned = turn_hue(images.float(), values.view(-1, 1, 1))
    return turned.mul_(255.999 / 255).to(torch.uint8)


def _blur(images: Tensor, values: Tensor) -> Tensor:
    """Blur as augmentation.blur does. values: gaussian_weights [k, 3]."""
    far, near, centre = values.view(-1, 3, 1, 1, 1).unbind(1)
    pixels = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="reflect")
    for axis in (2, 3):
        length = pixels.shape[axis] - 4
        total = pixels.narrow(axis, 0, length) * far
        for i, weight in enumerate((near, centre, near, far), 1):
            total.addcmul_(pixels.narrow(axis, i, length), weight)
        pixels = total
    return pixels.round_().to(torch.uint8)


def _sharpen(images: Tensor, values: Tensor) -> Tensor:
    """Sharpen as augmentation.sharpen does. values: factor - 1."""
    pixels = images.float()
    inner = pixels[..., 1:-1, 1:-1]
    inner.addcmul_(inner - mean_around(pixels), values.view(-1, 1, 1, 1))
    return pixels.clamp_(0, 255).to(torch.uint8)


def _filter(images: Tensor, values: Tensor) -> Tensor:
    """Filter as augmentation.filter_pixels does. values: weights of squares of one size."""
    side = math.isqrt(values.shape[1])
    margin = side // 2
    height, width = images.shape[-2:]
    around = torch.nn.functional.pad(images.float(), (margin,) * 4, mode="reflect")
    weights = values.view(*values.shape, 1, 1, 1).unbind(1)
    total = torch.zeros_like(images, dtype=torch.float32)
    for i, weight in enumerate(weights):
        row, column = divmod(i, side)
        total.addcmul_(around.narrow(2, row, height).narrow(3, column, width), weight)
    return total.round_().clamp_(0, 255).to(torch.uint8)


def _drop_grid(images: Tensor, values: Tensor) -> Tensor:
    """Black out the holes of a grid. values: as augmentation_draws.draw_grid returns them."""
    cell, hole, top, left = values.view(-1, 4, 1).unbind(1)
    rows = (_count(images, 2) + top) % cell < hole
    columns = (_count(images, 3) + left) % cell < hole
    return images.masked_fill_(rows[:, None, :, None] & columns[:, None, None], 0)


def _drop_holes(images: Tensor, values: Tensor) -> Tensor:
    """Black out holes. values: top, left, height and width of each; a height of 0 is none."""
    top, left, height, width = values.view(-1, MAX_HOLES, 4, 1).unbind(2)
    row = _count(images, 2)
    column = _count(images, 3)
    rows = ((row >= top) & (row < top + height)).float()  # [k, holes, H]
    columns = ((column >= left) & (column < left + width)).float()  # [k, holes, W]
    num_covering = rows.transpose(1, 2) @ columns
    return images.masked_fill_(num_covering[:, None] > 0, 0)


def _count(images: Tensor, axis: int) -> Tensor:
    return torch.arange(images.shape[axis], device=images.device, dtype=torch.float32)


def _flip(images: Tensor, _: Tensor) -> Tensor:
    return images.flip(-1)


def _turn_by(turns: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, _: torch.rot90(images, turns, (-2, -1))


def _roll(images: Tensor, values: Tensor) -> Tensor:
    """Roll each image by its own number of columns to the right."""
    width = images.shape[-1]
    columns = torch.arange(width, device=images.device)
    source = (columns - values.long()) % width
    return images.gather(-1, source[:, None, None].expand(images.shape))


def _black_out_sides(images: Tensor, values: Tensor) -> Tensor:
    """Black out each image's columns before its first value and from its second on."""
    columns = _count(images, 3)
    is_outside = (columns < values[:, :1]) | (columns >= values[:, 1:])
    return images.masked_fill_(is_outside[:, None, None], 0)


# Each takes uint8 [k, 3, H, W], a copy that it may change, and values float32 [k, v] of these
# images, and returns the same shape.
_CHANGES: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    "flip_first": _flip,
    "jpeg": _compress,
    "brightness": _change_brightness,
    "contrast": _change_contrast,
    "saturation": _change_saturation,
    "hue": _change_hue,
    "blur": _blur,
    "sharpen": _sharpen,
    "filter": _filter,
    "grid": _drop_grid,
    "holes": _drop_holes,
    "flip": _flip,
    "turn_90": _turn_by(1),
    "turn_180": _turn_by(2),
    "turn_270": _turn_by(3),
    "roll": _roll,
    "view": _black_out_sides,
}
