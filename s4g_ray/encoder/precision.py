"""Choose the precision and memory format of the encoder by measuring their speed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from s4g_ray.config.training_schema import ModelConfig, TrainConfig
from s4g_ray.data.image_table import View
from s4g_ray.encoder.checkpoint import load_encoder
from s4g_ray.encoder.encoder import Encoder

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Numerics:
    """Precision and memory format of the encoder's passes. The loss is always in float32."""

    precision: Precision = "fp32"  # of autocast
    channels_last: bool = False

    @property
    def name(self) -> str:
        """Return a readable name, such as `bf16 channels_last`."""
        return self.precision + (" channels_last" if self.channels_last else "")

    def prepare(self, encoder: Encoder) -> None:
        """Convert the encoder's weights to the memory format of the inputs."""
        if self.channels_last:
            encoder.to(memory_format=torch.channels_last)

    def layout(self, images: Tensor) -> Tensor:
        """Return the images in the chosen memory format."""
        if not self.channels_last:
            return images.contiguous()
        return images.contiguous(memory_format=torch.channels_last)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context for forward passes."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=self.precision != "fp32")

    def embed(self, encoder: Encoder, images: Tensor, view: View) -> Tensor:
        """Run encoder.embed with this precision and memory format."""
        with self.autocast(images.device):
            return encoder.embed(self.layout(images), view)


def numerics_choices(train: TrainConfig) -> list[Numerics]:
    """Return the choices that `auto` in the configuration allows, the plainest first."""
    precisions: list[Precision] = ["fp32", "bf16"]
    if train.precision != "auto":
        precisions = [train.precision]
    layouts = [False, True]
    if train.channels_last != "auto":
        layouts = [train.channels_last]
    return [
        Numerics(precision, channels_last) for precision in precisions for channels_last in layouts
    ]


def allow_tf32(train: TrainConfig, device: torch.device) -> None:
    """Set whether fp32 products of this process use TF32, on CUDA."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = train.tf32


def measure_numerics(
    model: ModelConfig, train: TrainConfig, size: tuple[int, int], checkpoint: str, device: str
) -> list[tuple[Numerics, float]]:
    """Measure the images per second of a training step for each of numerics_choices, best first.

    Measuring is needed: a processor without fast bf16, or an encoder of depthwise convolutions, is
    slower with bf16. Each choice is rated by its fastest step, as machines are shared, and must
    gain 10 % over a plainer one to come before it. size: height and width of references.
    """
    torch.set_num_threads(train.threads_per_worker)
    count = min(train.batch_size // train.workers[1], 16)
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8).to(device)
    allow_tf32(train, images.device)
    speeds = []
    for numerics in numerics_choices(train):
        # real weights: random ones can drive activations into slow subnormal numbers
        encoder = load_encoder(model, checkpoint).to(device).train()
        numerics.prepare(encoder)
        speeds.append((numerics, count / _measure_step_s(encoder, numerics, images)))
    return sorted(speeds, key=lambda pair: _discount_speed(*pair), reverse=True)


def _measure_step_s(encoder: Encoder, numerics: Numerics, images: Tensor) -> float:
    """Return the seconds of the fastest forward and backward pass among those run in 1.5 s."""
    best = math.inf
    deadline = time.perf_counter() + 1.5
    while best == math.inf or time.perf_counter() < deadline:
        started = time.perf_counter()
        loss = numerics.embed(encoder, images, "references").float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if images.device.type != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _discount_speed(numerics: Numerics, speed: float) -> float:
    """Return the speed less 10 % for each setting that differs from the plainest."""
    if numerics.precision != "fp32":
        speed *= 0.9
    if numerics.channels_last:
        speed *= 0.9
    return speed
