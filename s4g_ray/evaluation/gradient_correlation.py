"""Compute a baseline without learning: gradient correlation, as embeddings that can be ranked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s4g_ray.arrays import Floats32
from s4g_ray.config.data_schema import DataConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import load_view
from s4g_ray.data.schema import gallery_splits
from s4g_ray.errors import BadImageError
from s4g_ray.evaluation.scores import Score, score

SIDE = 32  # pixels a side of the gradient image


def gradient_correlation_embeddings(images: Tensor) -> Floats32:
    """uint8 images[N, 3, H, W] -> [N, SIDE * SIDE]; the cosine of two is their correlation.

    Each image becomes the magnitude of its Sobel gradients on a small grey image, minus its mean;
    the cosine of two is Pearson's correlation. Nothing is learned, and rotation is not compensated.
    """
    grey = images.float().mean(dim=1, keepdim=True)
    small = F.interpolate(
        grey, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
    )
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])[None, None]
    padded = F.pad(small, (1, 1, 1, 1), mode="replicate")
    across = F.conv2d(padded, kernel)
    down = F.conv2d(padded, kernel.transpose(2, 3))
    magnitude = torch.hypot(across, down).flatten(1)
    return np.asarray((magnitude - magnitude.mean(dim=1, keepdim=True)).numpy())


def score_gradient_correlation(
    dataset: GeoDataset, data: DataConfig, *, radii_m: Sequence[float], seed: int
) -> Score:
    """Score gradient correlation on the queries and the gallery of data.test_split.

    Raises BadImageError for a corrupt image when data.on_bad_image is `fail`.
    """
    split = data.test_split
    query_table = dataset.table("queries", [split])
    gallery_table = dataset.table("references", gallery_splits(split))
    query_images, queries = _load_images(query_table, "queries", data, seed)
    gallery_images, gallery = _load_images(gallery_table, "references", data, seed)
    embeddings = (
        gradient_correlation_embeddings(query_images),
        gradient_correlation_embeddings(gallery_images),
    )
    return score(dataset, split, queries, gallery, embeddings, radii_m=radii_m)


def _load_images(
    table: ImageTable, view: View, data: DataConfig, seed: int
) -> tuple[Tensor, ImageTable]:
    """Load images[n, 3, H, W] of a table, and return its rows that could be decoded."""
    images = []
    rows = []
    for row in range(len(table)):
        try:
            images.append(load_view(table, row, view, data, seed=seed))
            rows.append(row)
        except BadImageError:
            if data.on_bad_image == "fail":
                raise
    return torch.stack(images), table.take(np.asarray(rows))
