"""A training step in the published form: one process, losses read by the host at each step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4g_ray.encoder.encoder import Encoder


class PublishedStep:
    """Two forward passes, full logits, clipping by value, AdamW and a schedule step a batch.

    Source: arXiv 2303.11851, section 3, and its supplementary material.
    """

    def __init__(self, encoder: Encoder, device: torch.device, *, half: bool) -> None:
        self.encoder = encoder
        self.device = device
        self.half = half
        self.optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.01)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=half)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)

    def step(self, queries: Tensor, references: Tensor) -> float:
        """Train on uint8 queries[b, 3, h, w] and references[b, 3, H, W]; return the loss."""
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
