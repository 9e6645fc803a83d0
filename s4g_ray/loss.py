"""Symmetric InfoNCE over the global batch, exact across ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """rows[b, C] of each rank -> [W * b, C] in rank order; the backward sums what all ranks send back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        out = rows.new_empty((dist.get_world_size(group) * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        rank, size = dist.get_rank(ctx.group), len(total) // dist.get_world_size(ctx.group)
        return total[rank * size : (rank + 1) * size], None


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """rows[b, C] -> [W * b, C], in rank order and differentiable; as it is without a process group.

    Every rank must hold the same b. The backward is a sum over ranks (reduce-scatter).
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return rows
    return _GatherRows.apply(rows, group)  # type: ignore[no-any-return]


def symmetric_info_nce(
    queries: Tensor,
    references: Tensor,
    scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """queries[b, D], references[b, D], scale = exp(logit_scale) -> scalar.

    Row i of one is the match of row i of the other. Both are L2-normalised here, in float32 or wider; the
    logits span the global batch of W * b pairs. Under plain DDP (which averages gradients over ranks) the
    gradient is exactly that of one process over the global batch: each rank's value is its rows' share
    times W, so the mean of the ranks' values is the global loss.

    valid[b] bool leaves pairs out (both as anchors and as negatives); a global batch without a valid pair
    gives 0. Raises ValueError when shapes differ. Source: arXiv 2303.11851, section 3.2.
    """
    if queries.shape != references.shape or queries.ndim != 2:
        raise ValueError(f"queries{list(queries.shape)} and references{list(references.shape)} are not both [b, D]")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        local_q = F.normalize(queries.to(dtype), dim=1)
        local_r = F.normalize(references.to(dtype), dim=1)
        keep = torch.ones(len(queries), device=queries.device, dtype=dtype) if valid is None else valid.to(dtype)
        rows = gather_rows(torch.cat([local_q, local_r, keep[:, None]], dim=1), group)
        dim = local_q.shape[1]
        all_q, all_r, all_keep = rows[:, :dim], rows[:, dim:-1], rows[:, -1].detach()
        first = dist.get_rank(group) * len(queries) if len(rows) > len(queries) else 0
        targets = torch.arange(first, first + len(queries), device=queries.device)
        forward = _masked_cross_entropy(scale * local_q @ all_r.T, targets, all_keep, label_smoothing)
        backward = _masked_cross_entropy(scale * local_r @ all_q.T, targets, all_keep, label_smoothing)
        world = len(rows) // len(queries)
        loss: Tensor = ((forward + backward) / 2 * keep).sum() * world / all_keep.sum().clamp(min=1)
        return loss


def _masked_cross_entropy(logits: Tensor, targets: Tensor, keep: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of each row with uniform label smoothing over the kept columns: [b, N] -> [b].

    A left-out row (a rank's own target column is masked) gives a finite value, to be weighted by 0.
    """
    masked = logits.masked_fill(keep[None, :] == 0, -torch.inf)
    log_sum = torch.logsumexp(masked.scatter(1, targets[:, None], logits.gather(1, targets[:, None])), dim=1)
    positive = logits.gather(1, targets[:, None]).squeeze(1)
    mean = (logits * keep).sum(dim=1) / keep.sum().clamp(min=1)
    return log_sum - (1 - smoothing) * positive - smoothing * mean
