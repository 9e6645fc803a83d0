"""A hand-made baseline: gradient correlation, as embeddings that the evaluation can rank."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s4g_ray.arrays import Floats32
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import load_view
from s4g_ray.data.schema import gallery_splits
from s4g_ray.errors import BadImageError
from s4g_ray.evaluation.scores import Score, score

SIDE = 32  # pixels a side of the gradient image


def gradient_correlation_embeddings(images: Tensor) -> Floats32:
    """uint8 images[N, 3, H, W] -> [N, SIDE * SIDE]: their inner product, normalised, is a correlation.

    Each image becomes the magnitude of its Sobel gradients on a small grey image, less its mean; the cosine
    of two is Pearson's correlation. Nothing is learned, and nothing is done about rotation.
    """
    grey = images.float().mean(dim=1, keepdim=True)
    small = F.interpolate(
        grey, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
    )
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])[None, None]
    padded = F.pad(small, (1, 1, 1, 1), mode="replicate")
    magnitude = torch.hypot(
        F.conv2d(padded, kernel), F.conv2d(padded, kernel.transpose(2, 3))
    ).flatten(1)
    return np.asarray((magnitude - magnitude.mean(dim=1, keepdim=True)).numpy())


def score_gradient_correlation(config: RunConfig, dataset: GeoDataset) -> Score:
    """Score gradient correlation on the queries and the gallery that a run is tested on.

    Raises BadImageError for a corrupt image when `data.on_bad_image` is `fail`.
    """
    split = config.data.test_split
    images_q, queries = _load_images(config, dataset.table("queries", [split]), "queries")
    images_r, gallery = _load_images(
        config, dataset.table("references", gallery_splits(split)), "references"
    )
    embeddings = (
        gradient_correlation_embeddings(images_q),
        gradient_correlation_embeddings(images_r),
    )
    return score(dataset, split, queries, gallery, embeddings, radii_m=config.evaluation.radii_m)


def _load_images(config: RunConfig, table: ImageTable, view: View) -> tuple[Tensor, ImageTable]:
    """The images of a table and the rows that could be decoded."""
    images, rows = [], []
    for row in range(len(table)):
        try:
            images.append(load_view(table, row, view, config.data, seed=config.seed))
            rows.append(row)
        except BadImageError:
            if config.data.on_bad_image == "fail":
                raise
    return torch.stack(images), table.take(np.asarray(rows))
