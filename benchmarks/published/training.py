"""A training step in the published form: one process, losses read by the host at each step.

Written anew from the description of the method.

Source of the form: Sample4Geo (arXiv 2303.11851), section 3, and its supplementary material.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4g_ray.data.image_table import View
from s4g_ray.encoder.encoder import Encoder


class PublishedModel(nn.Module):
    """A backbone for both views and a scale; images are normalised before."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.model = backbone
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def embed(self, images: Tensor, view: View) -> Tensor:
        """Embed float32 [b, 3, H, W] -> [b, D]; the view makes no difference."""
        del view
        embedded: Tensor = self.model(images)
        return embedded


def cosine_with_warmup(step: int, *, num_warmup: float, num_steps: int) -> float:
    """Return the share of the learning rate at a step, which is counted from 0."""
    if step < num_warmup:
        return step / max(1.0, num_warmup)
    done = (step - num_warmup) / max(1.0, num_steps - num_warmup)
    return max(0.0, (1 + math.cos(math.pi * done)) / 2)


def keep_rate(_: int) -> float:
    """Return 1 at each step."""
    return 1.0


class PublishedStep:
    """Two forward passes, full logits, clipping by value, AdamW and a schedule step a batch."""

    def __init__(
        self,
        encoder: Encoder | PublishedModel,
        device: torch.device,
        *,
        half: bool,
        schedule: Callable[[int], float] = keep_rate,
    ) -> None:
        self.encoder = encoder
        self.device = device
        self.half = half
        self.optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.01)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=half)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def step(self, queries: Tensor, references: Tensor) -> float:
        """Train on queries[b, 3, h, w] and references[b, 3, H, W]; return the loss."""
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            embedded_q = F.normalize(self.encoder.embed(queries.to(self.device), "queries"), dim=-1)
            embedded_r = F.normalize(
                self.encoder.embed(references.to(self.device), "references"), dim=-1
            )
            logits = self.encoder.logit_scale.exp() * embedded_q @ embedded_r.T
            labels = torch.arange(len(logits), device=self.device)
            forward = F.cross_entropy(logits, labels, label_smoothing=0.1)
            backward = F.cross_entropy(logits.T, labels, label_smoothing=0.1)
            loss = (forward + backward) / 2
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_value_(self.encoder.parameters(), 100.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.item()
