"""A hand-made baseline: gradient correlation, as embeddings that the evaluation can rank."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SIDE = 32  # pixels a side of the gradient image


def gradient_correlation_embeddings(images: Tensor) -> NDArray[np.float32]:
    """uint8 images[N, 3, H, W] -> [N, SIDE * SIDE]: their inner product, normalised, is a correlation.

    Each image becomes the magnitude of its Sobel gradients on a small grey image, less its mean; the cosine
    of two is Pearson's correlation. Nothing is learned, and nothing is done about rotation.
    """
    grey = images.float().mean(dim=1, keepdim=True)
    small = F.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])[None, None]
    padded = F.pad(small, (1, 1, 1, 1), mode="replicate")
    magnitude = torch.hypot(F.conv2d(padded, kernel), F.conv2d(padded, kernel.transpose(2, 3))).flatten(1)
    return np.asarray((magnitude - magnitude.mean(dim=1, keepdim=True)).numpy())
