"""Compute the symmetric InfoNCE loss over the global batch, exactly across ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from s4g_ray.data.batches.common_ground import share_common_ground


class _GatherRows(torch.autograd.Function):
    """Gather rows[b, C] of each rank -> [W * b, C], in rank order.

    The backward pass sums the gradients of all ranks.
    """

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
        rank = dist.get_rank(ctx.group)
        num_rows = len(total) // dist.get_world_size(ctx.group)
        return total[rank * num_rows : (rank + 1) * num_rows], None


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather rows[b, C] of all ranks -> [W * b, C], in rank order and differentiable.

    Every rank must hold the same b. The backward pass is a sum over ranks (reduce-scatter). Without
    a process group, returns `rows`.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return rows
    return _GatherRows.apply(rows, group)  # type: ignore[no-any-return]


def gather_blocks(blocks: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Gather each block[n, C] -> [W * n, C] as gather_rows does, all in one collective."""
    flat = gather_rows(torch.cat([block.flatten() for block in blocks])[None], group)
    parts = torch.split(flat, [block.numel() for block in blocks], dim=1)
    return [part.reshape(-1, block.shape[1]) for part, block in zip(parts, blocks, strict=True)]


class SharedTargets(NamedTuple):
    """Weights in 0..1 of columns beside a row's own, whose weight is 1: its target is shared.

    Columns are those of the global batch of W * b pairs, in rank order, then W * e extra
    references. The weights of a row's own column are not read.
    """

    queries: Tensor  # [b, W * b + W * e]: of the references, for each query of this rank
    references: Tensor  # [b, W * b]: of the queries, for each reference of this rank


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
    shared: SharedTargets | None = None,
) -> Tensor:
    """Return the loss of queries[b, D] and references[b, D], a scalar. scale = exp(logit_scale).

    Row i of the queries matches row i of the references. Both are L2-normalised here, in float32 or
    wider; the logits span the global batch of W * b pairs. Under plain DDP (which averages
    gradients over ranks) the gradient is exactly that of one process over the global batch: each
    rank's value is its rows' share times W, so the mean of the ranks' values is the global loss.

    extra_references[e, D] (the same e on every rank) match no query: the W * e of them are
    negatives of every query, and not anchors themselves. The label smoothing of a query spreads
    over all its kept columns, extra ones included; that of a reference over the queries.

    shared: the target of a row is its kept columns by their weights, normalised to a sum of 1, in
    place of its own column alone; label smoothing takes its share of that target.

    valid[b] bool excludes pairs (both as anchors and as negatives), extra_valid[e] extra
    references; a global batch without a valid pair gives 0. Raises ValueError when shapes differ.
    Source: arXiv 2303.11851, section 3.2; for targets by common ground, Game4Loc (arXiv 2409.16925)
    and its weighted InfoNCE.
    """
    _check_shapes(queries, references, extra_references)
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        local = _LocalRows.from_pairs(queries, references, valid, dtype)
        extra = None
        if extra_references is not None:
            extra = torch.cat(_prepare(extra_references, extra_valid, dtype), dim=1)
        batch = local.gather(extra, group)
        world_size = len(batch.queries) // len(queries)
        first = dist.get_rank(group) * len(queries) if world_size > 1 else 0
        targets = torch.arange(first, first + len(queries), device=queries.device)
        forward = _masked_cross_entropy(
            scale * local.queries @ batch.references.T,
            targets,
            batch.keep_references,
            label_smoothing,
            None if shared is None else shared.queries,
        )
        backward = _masked_cross_entropy(
            scale * local.references @ batch.queries.T,
            targets,
            batch.keep_queries,
            label_smoothing,
            None if shared is None else shared.references,
        )
        total = ((forward + backward) / 2 * local.keep[:, 0]).sum()
        loss: Tensor = total * world_size / batch.keep_queries.sum().clamp(min=1)
        return loss


class _GlobalRows(NamedTuple):
    """The normalised rows of the global batch, and which of them count: 1, else 0."""

    queries: Tensor  # [N, D]
    references: Tensor  # [N + E, D], those without a query last
    keep_queries: Tensor  # [N]
    keep_references: Tensor  # [N + E]


class _LocalRows(NamedTuple):
    """The normalised rows of this rank's pairs, and which of them count: 1, else 0."""

    queries: Tensor  # [b, D]
    references: Tensor  # [b, D]
    keep: Tensor  # [b, 1]

    @classmethod
    def from_pairs(
        cls, queries: Tensor, references: Tensor, valid: Tensor | None, dtype: torch.dtype
    ) -> _LocalRows:
        """Normalise pairs of rows [b, D]; valid[b] bool: which of them count, None: all."""
        local_q, keep = _prepare(queries, valid, dtype)
        local_r, _ = _prepare(references, valid, dtype)
        return cls(local_q, local_r, keep)

    def gather(self, extra: Tensor | None, group: dist.ProcessGroup | None) -> _GlobalRows:
        """Gather the rows of all ranks in one collective; extra[e, D + 1]: others with keep."""
        dim = self.queries.shape[1]
        blocks = [torch.cat(self, dim=1)]
        if extra is not None:
            blocks.append(extra)
        pairs, *extras = gather_blocks(blocks, group)
        keep = pairs[:, -1].detach()
        references = torch.cat([pairs[:, dim:-1], *(rows[:, :-1] for rows in extras)])
        keep_references = torch.cat([keep, *(rows[:, -1].detach() for rows in extras)])
        return _GlobalRows(pairs[:, :dim], references, keep, keep_references)


def _prepare(rows: Tensor, valid: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows[n, D] L2-normalised in a dtype, and a column [n, 1]: 1 where valid, else 0."""
    keep = torch.ones(len(rows), 1, device=rows.device, dtype=dtype)
    if valid is not None:
        keep = valid.to(dtype)[:, None]
    return F.normalize(rows.to(dtype), dim=1), keep


def share_targets(
    ground: Tensor,
    gallery: Tensor | None,
    *,
    strength: float,
    min_share: float,
    group: dist.ProcessGroup | None = None,
) -> SharedTargets:
    """Return the weights of a rank's share of a global batch, from the squares of its ground.

    ground[b, 6] of pairs, gallery[e, 3] of references without a query, float64, as common_ground
    finds them; all ranks must hold the same b and e, and gather them in one collective. A tile's
    weight for a query is strength * min(1, s / own): s is the share of ground that it has in common
    with the query's square, own that of the query's own tile. 0 where s is 0 or below min_share. A
    query's weight for a tile is that of the tile for the query.
    """
    blocks = [ground] if gallery is None else [ground, gallery]
    pairs, *others = gather_blocks(blocks, group)
    first = 0
    if len(pairs) > len(ground):
        first = dist.get_rank(group) * len(ground)
    own = slice(first, first + len(ground))
    queries = pairs[:, :3]
    tiles = pairs[:, 3:]
    columns = torch.cat([tiles, *others])
    own_shares = share_common_ground(queries, tiles)

    def weigh(rows: Tensor, columns: Tensor, own_share: Tensor) -> Tensor:
        shares = share_common_ground(rows, columns)
        counts = (shares > 0) & (shares >= min_share)
        weights = strength * (shares / own_share).clamp(max=1)
        return torch.where(counts, weights, 0.0)

    return SharedTargets(
        weigh(queries[own, None], columns[None], own_shares[own, None]),
        weigh(queries[None], tiles[own, None], own_shares[None]),
    )


def _check_shapes(queries: Tensor, references: Tensor, extra_references: Tensor | None) -> None:
    if queries.shape != references.shape or queries.ndim != 2:
        raise ValueError(
            f"queries{list(queries.shape)} and references{list(references.shape)} are not both"
            " [b, D]"
        )
    if extra_references is None:
        return
    dim = queries.shape[1]
    if extra_references.ndim != 2 or extra_references.shape[1] != dim:
        raise ValueError(f"extra_references{list(extra_references.shape)} is not [e, {dim}]")


def _masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    keep: Tensor,
    smoothing: float,
    weights: Tensor | None,
) -> Tensor:
    """Return the cross entropy of each row: logits[b, N], targets[b], keep[N] -> [b].

    weights[b, N]: of the columns that share a row's target with its own; None: only that counts.
    Label smoothing is uniform over the kept columns. A row whose target column is masked gives a
    finite value, which the caller weights by 0.
    """
    columns = targets[:, None]
    masked = logits.masked_fill(keep[None, :] == 0, -torch.inf)
    log_sum = torch.logsumexp(masked.scatter(1, columns, logits.gather(1, columns)), dim=1)
    if weights is None:
        positive = logits.gather(1, columns).squeeze(1)
    else:
        shares = (weights.to(logits.dtype) * keep).scatter(1, columns, 1.0)
        positive = (logits * shares).sum(dim=1) / shares.sum(dim=1)
    mean = (logits * keep).sum(dim=1) / keep.sum().clamp(min=1)
    return log_sum - (1 - smoothing) * positive - smoothing * mean
