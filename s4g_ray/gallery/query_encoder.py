"""Embed photos with the encoder of a gallery, in this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s4g_ray.arrays import Floats32
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.image_table import View
from s4g_ray.data.images import crop_field_of_view, fit_query, fit_reference
from s4g_ray.encoder.checkpoint import load_encoder
from s4g_ray.encoder.precision import Numerics

BATCH = 32  # images of a forward pass


class QueryEncoder:
    """An encoder on a device, for many calls from many threads, one at a time."""

    def __init__(
        self, config: RunConfig, checkpoint: str, numerics: Numerics, device: str | None = None
    ) -> None:
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(chosen)
        # the heading of a photo is unknown: it is taken as it is
        self._data = config.data.model_copy(update={"query_heading": "as_is"})
        self._numerics = numerics
        self._encoder = load_encoder(config.model, checkpoint).to(self.device).eval()
        numerics.prepare(self._encoder)
        self._lock = threading.Lock()

    def encode(self, images: Sequence[NDArray[np.uint8]], view: View) -> Floats32:
        """Embed uint8 images [H, W, 3] of any sizes -> float32 [M, D], each of length 1."""
        found = [np.zeros((0, self._encoder.dim), np.float32)]
        for start in range(0, len(images), BATCH):
            fitted = [self._fit(image, view) for image in images[start : start + BATCH]]
            with self._lock, torch.inference_mode():
                batch = torch.stack(fitted).to(self.device)
                vectors = self._numerics.embed(self._encoder, batch, view).float()
                unit = torch.nn.functional.normalize(vectors, dim=1)
                found.append(unit.cpu().numpy())
        return np.concatenate(found)

    def _fit(self, image: NDArray[np.uint8], view: View) -> Tensor:
        """Resize and crop an image as evaluation sees it. Raises ValueError for other shapes."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image{list(image.shape)} of {image.dtype} is not uint8 [H, W, 3]")
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if view == "references":
            return fit_reference(tensor, self._data)
        fitted = fit_query(tensor, self._data, float("nan"))
        return crop_field_of_view(fitted, self._data, np.random.default_rng(0))
