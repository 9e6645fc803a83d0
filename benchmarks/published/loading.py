"""Load images for evaluation as published: every step for one image at a time.

Written anew from the description of the method.

Source of the form: Sample4Geo (arXiv 2303.11851), its pipeline of OpenCV and albumentations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEAN = 255 * np.array([0.485, 0.456, 0.406])  # of RGB
STD = 255 * np.array([0.229, 0.224, 0.225])
TABLE = ((np.arange(256)[:, None] - MEAN) / STD).astype(np.float32)[None]
Normalise = Callable[[NDArray[np.uint8]], Any]  # uint8 [H, W, 3] -> float32


def by_arithmetic(image: NDArray[np.uint8]) -> Any:
    """Normalise by OpenCV's arithmetic, as albumentations did when the code was published."""
    pixels = image.astype(np.float32)
    cv2.subtract(pixels, np.array([*MEAN, 0.0]), pixels)
    cv2.multiply(pixels, np.array([*(1 / STD), 1.0]), pixels)
    return pixels


def by_table(image: NDArray[np.uint8]) -> Any:
    """Normalise by a table of 256 values, the fastest form known here."""
    return cv2.LUT(image, TABLE)


def load_image(path: str, size: tuple[int, int], normalise: Normalise) -> Tensor:
    """Read, order the colours, resize (exact bilinear) and normalise: float32 [3, H, W]."""
    image: Any = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]
    image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR_EXACT)
    return torch.from_numpy(normalise(image).transpose(2, 0, 1))


def load_batch(
    paths: Sequence[str], size: tuple[int, int], normalise: Normalise = by_arithmetic
) -> Tensor:
    """Load images as float32 [n, 3, H, W]."""
    return torch.stack([load_image(path, size, normalise) for path in paths])
