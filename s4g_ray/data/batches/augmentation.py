"""Augment training images, consistently across the two views of a pair.

Images are uint8 [3, H, W]. All draws come from the given generator, by batches/augmentation_draws;
batches/device_augmentation does the same to batches on a device. Colours, blur and sharpening
follow torchvision's formulas in fewer passes over the pixels. torchvision itself is not imported:
it takes longer to start than all else that a loader process needs besides torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from s4g_ray.config.data_schema import AugmentConfig, Size
from s4g_ray.data.batches.augmentation_draws import (
    COLORS,
    ImageDraws,
    Operation,
    check_square,
    draw_changes,
    draw_first_flip,
    draw_geometry,
    draw_grid,
    draw_quality,
    draw_squares,
    gaussian_weights,
    panorama_shift,
)
from s4g_ray.data.batches.published_draws import View
from s4g_ray.data.images import LARGEST_JPEG

Fit = Callable[[Tensor], Tensor]
_GREY = (0.2989, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def _keep_size(image: Tensor) -> Tensor:
    return image


def augment_pair(
    query: Tensor,
    reference: Tensor,
    cfg: AugmentConfig,
    rng: np.random.Generator,
    fits: tuple[Fit, Fit] = (_keep_size, _keep_size),
) -> tuple[Tensor, Tensor]:
    """Augment the two views of a pair, uint8 [3, H, W] each; geometry is drawn once for both.

    `fits` resize the stored images (query, reference) after JPEG compression and before everything
    else, as in the published order.
    """
    flips_first = draw_first_flip(cfg, rng)
    query = _augment_view(query, cfg, rng, fits[0], "query", flips_first=flips_first)
    reference = _augment_view(reference, cfg, rng, fits[1], "reference", flips_first=flips_first)
    is_flipped, turns = draw_geometry(cfg, rng, may_turn=cfg.rotate != "none")
    if is_flipped:
        query = query.flip(-1)
        reference = reference.flip(-1)
    if turns:
        query, reference = rotate_pair(query, reference, turns, cfg.rotate)
    return query, reference


def augment_reference(
    reference: Tensor, cfg: AugmentConfig, rng: np.random.Generator, fit: Fit = _keep_size
) -> Tensor:
    """Augment a reference without a query, uint8 [3, h, w], as augment_pair does one of a pair."""
    flips_first = draw_first_flip(cfg, rng)
    reference = _augment_view(reference, cfg, rng, fit, "reference", flips_first=flips_first)
    is_flipped, turns = draw_geometry(cfg, rng, may_turn=cfg.rotate not in ("none", "query"))
    if is_flipped:
        reference = reference.flip(-1)
    if turns:
        _, reference = rotate_pair(reference, reference, turns, "reference")
    return reference


def rotate_pair(query: Tensor, reference: Tensor, turns: int, how: str) -> tuple[Tensor, Tensor]:
    """Turn the reference counter-clockwise by `turns` * 90 degrees, and the query to match it.

    A panorama's columns are azimuths, growing to the right. East of a north-up tile moves to the
    top once the tile is turned, so the columns move left by turns * W / 4 (rounded, for widths that
    4 does not divide). Raises ValueError for a tile that is not square.
    """
    turned = []
    if how in ("planar", "query"):
        turned.append(query)
    if how != "query":
        turned.append(reference)
    for image in turned:
        check_square(image.shape[-2:])
    if how == "panorama":
        query = torch.roll(query, panorama_shift(turns, query.shape[-1]), -1)
    elif how in ("planar", "query"):
        query = torch.rot90(query, turns, (-2, -1))
    if how != "query":
        reference = torch.rot90(reference, turns, (-2, -1))
    return query, reference


def _augment_view(
    image: Tensor,
    cfg: AugmentConfig,
    rng: np.random.Generator,
    fit: Fit,
    view: View,
    *,
    flips_first: bool,
) -> Tensor:
    """Augment one view: first flip, JPEG compression, `fit`, colours, blur or sharpening, dropout.

    A flipped picture is fitted as it is stored: a heading is of that one.
    """
    if flips_first:
        image = image.flip(-1)
    quality = draw_quality(cfg, rng)
    if quality is not None:
        image = recompress(image, quality)
    # Decoded pixels are interleaved, in which the operations below would take twice as long.
    image = fit(image.flip(-1)).flip(-1) if flips_first else fit(image)
    image = image.contiguous()
    return _change(image, draw_changes(cfg, rng, _size_of(image), view))


def _change(image: Tensor, draws: ImageDraws) -> Tensor:
    """Apply colours, blur or sharpening, and dropout as drawn."""
    colors = {name: draws[name][0] for name in draws if name in COLORS}
    if colors:
        image = change_colors(image, colors)
    if "blur" in draws:
        image = blur(image, *draws["blur"])
    if "sharpen" in draws:
        image = sharpen(image, *draws["sharpen"])
    if "filter" in draws:
        image = filter_pixels(image, draws["filter"])
    if "grid" in draws:
        image = _drop_grid(image, *(int(value) for value in draws["grid"]))
    if "holes" in draws:
        image = _drop_holes(image, [int(value) for value in draws["holes"]])
    return image


def _size_of(image: Tensor) -> Size:
    height, width = image.shape[-2:]
    return height, width


def recompress(image: Tensor, quality: int) -> Tensor:
    """Compress an image as JPEG of a quality of 1..100 and decode it again.

    Returns images that are too large for the format unchanged.
    """
    if max(image.shape) > LARGEST_JPEG:
        return image
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    data = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420")
    return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)


def change_colors(image: Tensor, changes: Mapping[Operation, float]) -> Tensor:
    """Change the colours of uint8 [3, H, W] in the given order.

    Brightness, contrast and saturation are multiplied by a factor, the hue is turned by a share of
    the circle. Values are rounded down and clipped after each step, as by torchvision's adjust_*.
    """
    pixels = image.float()
    for name, value in changes.items():
        pixels = _COLOR_CHANGES[name](pixels, value)
    return pixels.to(torch.uint8)


def _change_brightness(pixels: Tensor, factor: float) -> Tensor:
    return clip_and_floor(pixels.mul_(factor))


def _change_contrast(pixels: Tensor, factor: float) -> Tensor:
    mean = float(compute_grey(pixels).mean())
    return clip_and_floor(pixels.mul_(factor).add_((1 - factor) * mean))


def _change_saturation(pixels: Tensor, factor: float) -> Tensor:
    grey = compute_grey(pixels)
    return clip_and_floor(pixels.mul_(factor).add_(grey, alpha=1 - factor))


def _change_hue(pixels: Tensor, share: float) -> Tensor:
    return turn_hue(pixels, 6 * share).mul_(255.999 / 255).floor_()


# Each takes float [3, H, W] of whole numbers in 0..255, which it may change, and gives the same.
_COLOR_CHANGES: Mapping[Operation, Callable[[Tensor, float], Tensor]] = {
    "brightness": _change_brightness,
    "contrast": _change_contrast,
    "saturation": _change_saturation,
    "hue": _change_hue,
}


def clip_and_floor(pixels: Tensor) -> Tensor:
    """Round float pixels down, within 0..255, in place."""
    return pixels.clamp_(0, 255).floor_()


def compute_grey(pixels: Tensor) -> Tensor:
    """Return the brightness of float [..., 3, H, W], rounded down: [..., H, W]."""
    red, green, blue = pixels.unbind(-3)
    grey = red * _GREY[0]
    return grey.add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2]).floor_()


def turn_hue(pixels: Tensor, sixths: float | Tensor) -> Tensor:
    """Turn the hue of float [..., 3, H, W] by sixths of the circle, one number or [..., 1, 1].

    A channel of a colour with largest value v, range c and hue h (0..6) is
    v - c max(0, min(k, 4 - k, 1)), where k = (n + h) mod 6 and n = 5, 3, 1 for red, green and
    blue (HSV).
    """
    red, green, blue = pixels.unbind(-3)
    high = pixels.amax(-3)  # aminmax takes twenty times as long along this axis
    extent = high - pixels.amin(-3)
    top = torch.where(high == green, blue - red + 2 * extent, red - green + 4 * extent)
    hue = torch.where(high == red, green - blue, top).div_(extent.clamp(min=1)).add_(sixths)
    # Made on the device: a tensor of these numbers would be copied to it, which waits.
    n = torch.arange(5, 0, -2, dtype=torch.float32, device=pixels.device)
    k = hue.unsqueeze(-3) + n.view(3, 1, 1)
    k.sub_(torch.div(k, 6).floor_(), alpha=6)
    weight = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return high.unsqueeze(-3) - weight.mul_(extent.unsqueeze(-3))


def blur(image: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian of 5 x 5 pixels, uint8 [3, H, W]; the borders are mirrored."""
    far, near, centre = gaussian_weights(sigma)
    weights = (far, near, centre, near, far)
    pixels: Tensor = torch.nn.functional.pad(image.float()[None], (2, 2, 2, 2), mode="reflect")[0]
    for axis in (1, 2):
        length = pixels.shape[axis] - 4
        total = pixels.narrow(axis, 0, length) * weights[0]
        for i in range(1, 5):
            total.add_(pixels.narrow(axis, i, length), alpha=weights[i])
        pixels = total
    return pixels.round_().to(torch.uint8)


def sharpen(image: Tensor, factor: float) -> Tensor:
    """Move pixels away from the mean of their 3 x 3 neighbourhood, uint8 [3, H, W].

    The mean counts the centre five times. factor: 1 leaves the image unchanged, 2 doubles the
    distance; the outermost pixels stay.
    """
    pixels = image.float()
    inner = pixels[..., 1:-1, 1:-1]
    inner.add_(inner - mean_around(pixels), alpha=factor - 1)
    return pixels.clamp_(0, 255).to(torch.uint8)


def mean_around(pixels: Tensor) -> Tensor:
    """Return the rounded mean around each pixel but the outermost: [..., H - 2, W - 2].

    Of the nine pixels around, that in the centre counts five times. pixels: float [..., H, W].
    """
    lines = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    total = (lines[..., :-2] + lines[..., 1:-1]).add_(lines[..., 2:])
    return total.add_(pixels[..., 1:-1, 1:-1], alpha=4).div_(13).round_()


def filter_pixels(image: Tensor, weights: Sequence[float]) -> Tensor:
    """Replace pixels by a weighted sum of those around them, uint8 [3, H, W].

    weights: of a square of 3, 5 or 7 pixels a side, row by row; the borders are mirrored. Sums are
    rounded and clipped.
    """
    side = math.isqrt(len(weights))
    margin = side // 2
    height, width = image.shape[-2:]
    around = torch.nn.functional.pad(image.float()[None], (margin,) * 4, mode="reflect")[0]
    total = torch.zeros(image.shape)
    for i, weight in enumerate(weights):
        row, column = divmod(i, side)
        part = around.narrow(1, row, height).narrow(2, column, width)
        total.add_(part, alpha=weight)
    return total.round_().clamp_(0, 255).to(torch.uint8)


def coarse_dropout(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Black out 10..25 squares of 10..20 % of the image's height."""
    return _drop_holes(image, draw_squares(rng, _size_of(image)))


def grid_dropout(image: Tensor, rng: np.random.Generator, ratio: float = 0.4) -> Tensor:
    """Black out one square in each cell of a regular grid at a random offset.

    A square's side is `ratio` of the cell's.
    """
    return _drop_grid(image, *draw_grid(rng, image.shape[-2], ratio))


def _drop_holes(image: Tensor, holes: Sequence[int]) -> Tensor:
    image = image.clone()
    for i in range(0, len(holes), 4):
        top, left, height, width = holes[i : i + 4]
        image[:, top : top + height, left : left + width] = 0
    return image


def _drop_grid(image: Tensor, cell: int, hole: int, top: int, left: int) -> Tensor:
    height, width = image.shape[-2:]
    rows = (np.arange(height) + top) % cell < hole
    columns = (np.arange(width) + left) % cell < hole
    return image.masked_fill(torch.from_numpy(rows[:, None] & columns), 0)
