"""Augment training images, consistently across the two views of a pair.

Images are uint8 [3, H, W]. All draws come from the given generator, in an order that does not
depend on what the images show. Colour, blur and sharpening follow torchvision's formulas in fewer
passes over the pixels. torchvision itself is not imported: it takes longer to start than all else
that a loader process needs besides torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from s4g_ray.config.data_schema import AugmentConfig

LARGEST_JPEG = 65_500  # pixels a side
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
    query = _augment_view(query, cfg, rng, fits[0])
    reference = _augment_view(reference, cfg, rng, fits[1])
    if rng.random() < cfg.flip_probability:
        query = query.flip(-1)
        reference = reference.flip(-1)
    turns = int(rng.integers(1, 4))
    if cfg.rotate != "none" and rng.random() < cfg.rotate_probability:
        query, reference = rotate_pair(query, reference, turns, cfg.rotate)
    return query, reference


def augment_reference(
    reference: Tensor, cfg: AugmentConfig, rng: np.random.Generator, fit: Fit = _keep_size
) -> Tensor:
    """Augment a reference without a query, uint8 [3, h, w], as augment_pair does one of a pair."""
    reference = _augment_view(reference, cfg, rng, fit)
    if rng.random() < cfg.flip_probability:
        reference = reference.flip(-1)
    turns = int(rng.integers(1, 4))
    if cfg.rotate not in ("none", "query") and rng.random() < cfg.rotate_probability:
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
    if any(image.shape[-1] != image.shape[-2] for image in turned):
        raise ValueError("rotation by 90 degrees needs square images; set augment.rotate=none")
    if how == "panorama":
        query = torch.roll(query, -round(turns * query.shape[-1] / 4), -1)
    elif how in ("planar", "query"):
        query = torch.rot90(query, turns, (-2, -1))
    if how != "query":
        reference = torch.rot90(reference, turns, (-2, -1))
    return query, reference


def _augment_view(image: Tensor, cfg: AugmentConfig, rng: np.random.Generator, fit: Fit) -> Tensor:
    """Augment one view: JPEG compression, `fit`, colour, blur or sharpening, dropout."""
    if rng.random() < cfg.jpeg_probability:
        image = recompress(image, int(rng.integers(cfg.jpeg_quality[0], cfg.jpeg_quality[1] + 1)))
    # Decoded pixels are interleaved, in which the operations below would take twice as long.
    image = fit(image).contiguous()
    if rng.random() < cfg.color_probability:
        strength = cfg.color_strength
        brightness, contrast, saturation = 1 + rng.uniform(-strength, strength, 3)
        hue = rng.uniform(-strength, strength)
        image = jitter(image, brightness, contrast, saturation, hue)
    if rng.random() < cfg.blur_probability:
        if rng.random() < 0.5:
            image = blur(image, rng.uniform(0.3, 1.2))
        else:
            image = sharpen(image, 1 + rng.uniform(0.2, 1.0))
    if rng.random() < cfg.dropout_probability:
        drop = grid_dropout if rng.random() < 0.5 else coarse_dropout
        image = drop(image, rng)
    return image


def recompress(image: Tensor, quality: int) -> Tensor:
    """Compress an image as JPEG of a quality of 1..100 and decode it again.

    Returns images that are too large for the format unchanged.
    """
    if max(image.shape) > LARGEST_JPEG:
        return image
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    data = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420")
    return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)


def jitter(
    image: Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> Tensor:
    """Multiply brightness, contrast and saturation, in this order, then turn the hue.

    uint8 [3, H, W]. The first three are factors, hue is a share of the circle. Values are rounded
    down and clipped after each step, as by torchvision's adjust_*.
    """
    pixels = _clip_and_floor(image.float().mul_(brightness))
    mean = float(_grey(pixels).mean())
    pixels = _clip_and_floor(pixels.mul_(contrast).add_((1 - contrast) * mean))
    grey = _grey(pixels)
    pixels = _clip_and_floor(pixels.mul_(saturation).add_(grey, alpha=1 - saturation))
    return _turn_hue(pixels, hue).mul_(255.999 / 255).to(torch.uint8)


def _clip_and_floor(pixels: Tensor) -> Tensor:
    return pixels.clamp_(0, 255).floor_()


def _grey(pixels: Tensor) -> Tensor:
    grey = pixels[0] * _GREY[0]
    return grey.add_(pixels[1], alpha=_GREY[1]).add_(pixels[2], alpha=_GREY[2]).floor_()


def _turn_hue(pixels: Tensor, share: float) -> Tensor:
    """Turn the hue of float [3, H, W] by a share of the circle.

    A channel of a colour with largest value v, range c and hue h (0..6) is
    v - c max(0, min(k, 4 - k, 1)), where k = (n + h) mod 6 and n = 5, 3, 1 for red, green and
    blue (HSV).
    """
    red, green, blue = pixels
    high = pixels.amax(0)  # aminmax takes twenty times as long along this axis
    extent = high - pixels.amin(0)
    top = torch.where(high == green, blue - red + 2 * extent, red - green + 4 * extent)
    hue = torch.where(high == red, green - blue, top).div_(extent.clamp(min=1)).add_(6 * share)
    k = hue + torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    k.sub_(torch.div(k, 6).floor_(), alpha=6)
    weight = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return high - weight.mul_(extent)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian of 5 x 5 pixels, uint8 [3, H, W]; the borders are mirrored."""
    near = math.exp(-0.5 * (1 / sigma) ** 2)
    far = math.exp(-0.5 * (2 / sigma) ** 2)
    total_weight = 1 + 2 * near + 2 * far
    weights = [weight / total_weight for weight in (far, near, 1.0, near, far)]
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
    lines = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    inner = pixels[:, 1:-1, 1:-1]
    total = (lines[..., :-2] + lines[..., 1:-1]).add_(lines[..., 2:]).add_(inner, alpha=4)
    mean = total.div_(13).round_()
    inner.add_(inner - mean, alpha=factor - 1)
    return pixels.clamp_(0, 255).to(torch.uint8)


def coarse_dropout(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Black out 10..25 squares of 10..20 % of the image's height."""
    image = image.clone()
    height, width = image.shape[-2:]
    for _ in range(int(rng.integers(10, 26))):
        side = max(1, round(rng.uniform(0.1, 0.2) * height))
        top = rng.integers(0, max(height - side, 0) + 1)
        left = rng.integers(0, max(width - side, 0) + 1)
        image[:, top : top + side, left : left + side] = 0
    return image


def grid_dropout(image: Tensor, rng: np.random.Generator, ratio: float = 0.4) -> Tensor:
    """Black out one square in each cell of a regular grid at a random offset.

    A square's side is `ratio` of the cell's.
    """
    height, width = image.shape[-2:]
    cell = max(2, round(rng.uniform(0.125, 0.25) * height))
    hole = max(1, round(ratio * cell))
    rows = (np.arange(height) + int(rng.integers(cell))) % cell < hole
    columns = (np.arange(width) + int(rng.integers(cell))) % cell < hole
    return image.masked_fill(torch.from_numpy(rows[:, None] & columns), 0)
