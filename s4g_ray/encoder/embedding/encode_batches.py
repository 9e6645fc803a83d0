"""Run the encoder over batches, copying each to the GPU while it computes the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from s4g_ray.arrays import Floats32
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.data.image_table import View
from s4g_ray.encoder.embedding.outcomes import EncodingJob
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.encoder.weights import load_weights
from s4g_ray.encoder.weights_file import WEIGHTS
from s4g_ray.errors import RunError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import open_published, read_part

AHEAD = 2  # batches that a GPU has been given: it computes one while the next is copied


class BatchEncoder:
    """An encoder on a device. Used by one thread, but for collect."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self._build = partial(Encoder.build, model, weights=False)
        self._device = device
        self._encoder: tuple[Numerics, Encoder] | None = None
        self._weights_sha256 = ""
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._passes: deque[torch.cuda.Event] = deque()

    def load(self, job: EncodingJob) -> None:
        """Prepare the encoder with the job's numerics and weights; loads only changed ones.

        Raises RunError for a checkpoint that is unpublished or altered.
        """
        if self._encoder is None or self._encoder[0] != job.numerics:
            encoder = self._build().to(self._device).eval()
            job.numerics.prepare(encoder)
            self._encoder = (job.numerics, encoder)
            self._weights_sha256 = ""
        if self._weights_sha256 == job.weights_sha256:
            return
        self._weights_sha256 = ""  # until all weights are loaded
        part = open_published(job.checkpoint, "checkpoint").part(WEIGHTS)
        if part is None or part.sha256 != job.weights_sha256:
            raise RunError(
                f"{job.checkpoint} no longer holds the {WEIGHTS} that this job began with; resume"
            )
        data = read_part(job.checkpoint, part)
        load_weights(self._encoder[1], data, files.join(job.checkpoint, WEIGHTS))
        self._weights_sha256 = job.weights_sha256

    def embed(self, numerics: Numerics, images: Tensor, view: View) -> Tensor:
        """Embed uint8 images[b, 3, H, W] -> float32 [b, D] on the device, L2-normalised.

        Returns when the images have been read, on a GPU before the embeddings are computed.
        """
        assert self._encoder is not None
        encoder = self._encoder[1]
        if not len(images):  # none could be decoded
            return torch.zeros((0, encoder.dim), device=self._device)
        with torch.inference_mode():
            if self._copies is None:
                return _normalize(numerics.embed(encoder, images, view))
            with torch.cuda.stream(self._copies):
                copied = images.to(self._device, non_blocking=True)
                is_copied = self._copies.record_event()
            while len(self._passes) >= AHEAD:  # a queue without end would hold all their images
                self._passes.popleft().synchronize()
            current = torch.cuda.current_stream(self._device)
            current.wait_event(is_copied)
            copied.record_stream(current)
            vectors = _normalize(numerics.embed(encoder, copied, view))
            self._passes.append(current.record_event())
            is_copied.synchronize()  # the caller may overwrite the images
            return vectors

    def collect(self, batches: Sequence[Tensor]) -> Floats32:
        """Return the embeddings of batches in one array [n, D]."""
        assert self._encoder is not None
        if not batches:
            return np.zeros((0, self._encoder[1].dim), dtype=np.float32)
        with torch.inference_mode():
            vectors: Floats32 = torch.cat(list(batches)).cpu().numpy()
        return vectors

    def release_memory(self) -> None:
        """Free the GPU memory that torch caches for the next batch."""
        self._passes.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _normalize(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=1)
