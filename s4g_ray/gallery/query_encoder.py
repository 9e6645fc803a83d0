"""Embed photos with the encoder of a gallery, in this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from s4g_ray.arrays import Floats32
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.image_table import View
from s4g_ray.data.images import Pixels, fit_reference
from s4g_ray.encoder.checkpoint import load_encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.gallery.photos.encoder_input import as_tensor, fit_photo, take_as_is

BATCH = 32  # images of a forward pass
MOST_CALLS = 4  # at once: each holds the activations of a batch


class QueryEncoder:
    """An encoder on a device, for calls from any number of threads.

    On a CPU up to MOST_CALLS of them compute at once, on a GPU one.
    """

    def __init__(
        self, config: RunConfig, checkpoint: str, numerics: Numerics, device: str | None = None
    ) -> None:
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(chosen)
        self._data = take_as_is(config.data)
        self._numerics = numerics
        self._encoder = load_encoder(config.model, checkpoint).to(self.device).eval()
        numerics.prepare(self._encoder)
        # a GPU computes one batch at a time; on a CPU each caller brings threads of its own
        self._calls = threading.BoundedSemaphore(MOST_CALLS if self.device.type == "cpu" else 1)

    def encode(self, images: Sequence[Pixels], view: View) -> Floats32:
        """Embed uint8 images [H, W, 3] of any sizes -> float32 [M, D], each of length 1."""
        found = [np.zeros((0, self._encoder.dim), np.float32)]
        for start in range(0, len(images), BATCH):
            fitted = [self._fit(image, view) for image in images[start : start + BATCH]]
            found.append(self.embed(np.stack(fitted), view))
        return np.concatenate(found)

    def embed(self, inputs: Pixels, view: View = "queries") -> Floats32:
        """Embed inputs uint8 [M, h, w, 3] of the encoder's size -> float32 [M, D], of length 1."""
        with self._calls, torch.inference_mode():
            batch = torch.from_numpy(inputs).to(self.device).permute(0, 3, 1, 2)
            vectors = self._numerics.embed(self._encoder, batch, view).float()
            unit: Floats32 = torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()
        return unit

    def _fit(self, image: Pixels, view: View) -> Pixels:
        """Resize and crop an image as evaluation sees it. Raises ValueError for other shapes."""
        if view == "queries":
            return fit_photo(image, self._data)
        return fit_reference(as_tensor(image), self._data).permute(1, 2, 0).numpy()
