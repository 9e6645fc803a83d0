"""Compile the encoder with torch.compile, or continue without."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import first_line


def compile_encoder(
    encoder: Encoder, numerics: Numerics, data: DataConfig, num_images: int, device: torch.device
) -> str | None:
    """Compile Encoder.embed and try a forward and a backward pass of num_images of each view.

    Returns None, or the reason for which some rank continues without: then all do. The names of
    the parameters stay.
    """
    buffers = [buffer.clone() for buffer in encoder.buffers()]  # statistics of batch norms
    encoder.embed = torch.compile(encoder.embed)  # type: ignore[method-assign]
    try:
        _try_pass(encoder, numerics, data, num_images, device)
        reason = ""
    except Exception as error:  # the compiler raises errors of many kinds
        reason = f"{type(error).__name__}: {first_line(error)}"
    with torch.no_grad():
        for buffer, before in zip(encoder.buffers(), buffers, strict=True):
            buffer.copy_(before)
    encoder.zero_grad(set_to_none=True)
    reasons = [reason]
    if dist.is_initialized():
        reasons = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
    failed = [reason for reason in reasons if reason]
    if not failed:
        return None
    del encoder.embed  # what hides the method of the class
    return failed[0]


def _try_pass(
    encoder: Encoder, numerics: Numerics, data: DataConfig, num_images: int, device: torch.device
) -> None:
    """Run both passes on black images, and drop the gradients."""

    def black(size: tuple[int, int]) -> Tensor:
        images = torch.zeros(num_images, 3, *size, dtype=torch.uint8, device=device)
        return numerics.layout(images)

    with numerics.autocast(device):
        queries, references, _ = encoder(black(data.visible_query_size), black(data.reference_size))
    (queries.float().sum() + references.float().sum()).backward()
