"""Symmetric InfoNCE over the global batch, exact across ranks."""

from __future__ import annotations

from collections.abc import Sequence
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


def _gather_blocks(blocks: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Each block[n, C] -> [W * n, C] as gather_rows does, all of them in one collective."""
    flat = gather_rows(torch.cat([block.flatten() for block in blocks])[None], group)
    parts = torch.split(flat, [block.numel() for block in blocks], dim=1)
    return [part.reshape(-1, block.shape[1]) for part, block in zip(parts, blocks, strict=True)]


def symmetric_info_nce(
    queries: Tensor,
    references: Tensor,
    scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
    extra_references: Tensor | None = None,
    extra_valid: Tensor | None = None,
) -> Tensor:
    """queries[b, D], references[b, D], scale = exp(logit_scale) -> scalar.

    Row i of one is the match of row i of the other. Both are L2-normalised here, in float32 or wider; the
    logits span the global batch of W * b pairs. Under plain DDP (which averages gradients over ranks) the
    gradient is exactly that of one process over the global batch: each rank's value is its rows' share
    times W, so the mean of the ranks' values is the global loss.

    extra_references[e, D] (the same e on every rank) match no query: the W * e of them are negatives of every
    query, and no anchors themselves. The label smoothing of a query spreads over all its kept columns, extra
    ones included; that of a reference over the queries.

    valid[b] bool leaves pairs out (both as anchors and as negatives), extra_valid[e] extra references; a global
    batch without a valid pair gives 0. Raises ValueError when shapes differ. Source: arXiv 2303.11851, section 3.2.
    """
    if queries.shape != references.shape or queries.ndim != 2:
        raise ValueError(
            f"queries{list(queries.shape)} and references{list(references.shape)} are not both [b, D]"
        )
    dim = queries.shape[1]
    if extra_references is not None and (
        extra_references.ndim != 2 or extra_references.shape[1] != dim
    ):
        raise ValueError(f"extra_references{list(extra_references.shape)} is not [e, {dim}]")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        local_q = F.normalize(queries.to(dtype), dim=1)
        local_r = F.normalize(references.to(dtype), dim=1)
        keep = _keep_column(valid, queries, dtype)
        blocks = [torch.cat([local_q, local_r, keep], dim=1)]
        if extra_references is not None:
            extra_keep = _keep_column(extra_valid, extra_references, dtype)
            blocks.append(
                torch.cat([F.normalize(extra_references.to(dtype), dim=1), extra_keep], dim=1)
            )
        rows, *extra = _gather_blocks(blocks, group)
        all_q, columns, all_keep = rows[:, :dim], rows[:, dim:-1], rows[:, -1].detach()
        columns_keep = all_keep
        for more in extra:
            columns = torch.cat([columns, more[:, :-1]])
            columns_keep = torch.cat([columns_keep, more[:, -1].detach()])
        first = dist.get_rank(group) * len(queries) if len(rows) > len(queries) else 0
        targets = torch.arange(first, first + len(queries), device=queries.device)
        forward = _masked_cross_entropy(
            scale * local_q @ columns.T, targets, columns_keep, label_smoothing
        )
        backward = _masked_cross_entropy(
            scale * local_r @ all_q.T, targets, all_keep, label_smoothing
        )
        world = len(rows) // len(queries)
        loss: Tensor = (
            ((forward + backward) / 2 * keep[:, 0]).sum() * world / all_keep.sum().clamp(min=1)
        )
        return loss


def _keep_column(valid: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """1 for each row that counts and 0 for others, [n, 1]."""
    keep = (
        torch.ones(len(rows), device=rows.device, dtype=dtype) if valid is None else valid.to(dtype)
    )
    return keep[:, None]


def _masked_cross_entropy(
    logits: Tensor, targets: Tensor, keep: Tensor, smoothing: float
) -> Tensor:
    """Cross entropy of each row with uniform label smoothing over the kept columns: [b, N] -> [b].

    A left-out row (a rank's own target column is masked) gives a finite value, to be weighted by 0.
    """
    masked = logits.masked_fill(keep[None, :] == 0, -torch.inf)
    log_sum = torch.logsumexp(
        masked.scatter(1, targets[:, None], logits.gather(1, targets[:, None])), dim=1
    )
    positive = logits.gather(1, targets[:, None]).squeeze(1)
    mean = (logits * keep).sum(dim=1) / keep.sum().clamp(min=1)
    return log_sum - (1 - smoothing) * positive - smoothing * mean
