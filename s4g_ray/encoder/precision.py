"""Numerics: precision and memory format, measured."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from s4g_ray.config.schema import ModelConfig, TrainConfig
from s4g_ray.encoder.checkpoint import load_encoder
from s4g_ray.encoder.encoder import Encoder

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Numerics:
    """How the encoder computes: the loss is in float32 in any case."""

    precision: Precision = "fp32"  # of autocast
    channels_last: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return self.precision + (" channels_last" if self.channels_last else "")

    def prepare(self, encoder: Encoder) -> None:
        """Lay the weights out in memory as the inputs will be."""
        if self.channels_last:
            encoder.to(memory_format=torch.channels_last)

    def layout(self, images: Tensor) -> Tensor:
        """The images in the chosen memory format."""
        return (
            images.contiguous(memory_format=torch.channels_last) if self.channels_last else images
        )

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which forward passes run."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=self.precision != "fp32")

    def embed(self, encoder: Encoder, images: Tensor) -> Tensor:
        """encoder.embed, computed this way."""
        with self.autocast(images.device):
            return encoder.embed(self.layout(images))


def numerics_choices(train: TrainConfig) -> list[Numerics]:
    """What the configuration leaves open, the plainest first."""
    precisions: list[Precision] = (
        ["fp32", "bf16"] if train.precision == "auto" else [train.precision]
    )
    channels_last = [False, True] if train.channels_last == "auto" else [train.channels_last]
    return [Numerics(p, c) for p in precisions for c in channels_last]


def measure_numerics(
    model: ModelConfig, train: TrainConfig, size: tuple[int, int], checkpoint: str, device: str
) -> list[tuple[Numerics, float]]:
    """Images per second of a training step, for each choice that the configuration leaves open, best first.

    A processor without fast bf16, or an encoder of depthwise convolutions, is slower with it: so measure. The
    fastest of some steps counts (machines are shared); a choice must gain 10 % over plainer ones.
    """
    torch.set_num_threads(train.threads_per_worker)
    count = min(train.batch_size // train.workers[1], 16)
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8).to(device)
    speeds = []
    for numerics in numerics_choices(train):
        # real weights: random ones can drive activations into slow subnormal numbers
        encoder = load_encoder(model, checkpoint).to(device).train()
        numerics.prepare(encoder)
        best, deadline = math.inf, time.perf_counter() + 1.5
        while best == math.inf or time.perf_counter() < deadline:
            started = time.perf_counter()
            numerics.embed(encoder, images).float().square().mean().backward()  # type: ignore[no-untyped-call]
            if device != "cpu":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        speeds.append((numerics, count / best))
    return sorted(
        speeds,
        key=lambda pair: -pair[1] * 0.9 ** ((pair[0].precision != "fp32") + pair[0].channels_last),
    )
