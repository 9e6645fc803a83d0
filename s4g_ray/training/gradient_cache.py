"""The gradient of a whole batch from chunks of it, for batches whose activations exceed memory (GradCache).

The loss needs the embeddings of all pairs at once, not their activations. So chunks are embedded without a graph,
the loss of all embeddings gives each embedding's gradient, and chunks are embedded again, now with a graph, through
which those gradients go back. It costs one more forward pass. Source: arXiv 2101.06983, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """What one pass takes of a batch of b pairs and e gallery references."""

    number: int
    pairs: slice
    gallery: slice
    rows: Tensor  # of the batch's embeddings [2 b + e, D]: those of its queries, references, gallery references


def divide(num_pairs: int, num_gallery: int, chunk_pairs: int | None) -> list[Chunk]:
    """Chunks of so many pairs, the last one of what is left (None: all pairs in one); gallery spread evenly."""
    size = chunk_pairs or num_pairs
    starts = range(0, num_pairs, size)
    chunks = []
    for number, start in enumerate(starts):
        pairs = slice(start, min(start + size, num_pairs))
        gallery = slice(
            number * num_gallery // len(starts), (number + 1) * num_gallery // len(starts)
        )
        queries = torch.arange(num_pairs)[pairs]
        rows = torch.cat(
            [queries, num_pairs + queries, 2 * num_pairs + torch.arange(num_gallery)[gallery]]
        )
        chunks.append(Chunk(number, pairs, gallery, rows))
    return chunks


def backward_in_chunks(
    chunks: Sequence[Chunk],
    embed: Callable[[Chunk], tuple[Tensor, Tensor]],
    backward: Callable[[Tensor, Tensor], float],
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """Add the gradient of a loss over all chunks to that of the parameters; its value, as `backward` returns it.

    embed(chunk) -> rows[n, D] and the scale. It is called twice a chunk and must give the same both times, random
    draws included. backward(rows[N, D], scale) computes the loss and calls its backward(). `no_sync` is the context
    of all backward passes but the last, in which DDP then reduces the sum of the gradients, once.
    """
    if len(chunks) == 1:
        return backward(*embed(chunks[0]))
    rows, scale = _embed_without_graph(chunks, embed)
    value = backward(rows, scale)
    if rows.grad is None or scale.grad is None:
        raise RuntimeError(
            "the loss depends on the embeddings and on the scale, but one of them has no gradient"
        )
    for chunk in chunks:
        last = chunk is chunks[-1]
        with nullcontext() if last else no_sync():
            again, scale_again = embed(chunk)
            roots, gradients = [again], [rows.grad[chunk.rows.to(rows.device)]]
            if last:  # of all chunks, as it was computed for all
                roots.append(scale_again)
                gradients.append(scale.grad)
            torch.autograd.backward(roots, gradients)
    return value


def _embed_without_graph(
    chunks: Sequence[Chunk], embed: Callable[[Chunk], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """rows[N, D] of all chunks in the batch's order and the scale: leaves, which will hold their gradients."""
    with torch.no_grad():
        parts = [embed(chunk) for chunk in chunks]
        rows = torch.cat([part for part, _ in parts])
        order = torch.cat([chunk.rows for chunk in chunks]).argsort().to(rows.device)
        return rows[order].requires_grad_(), parts[0][1].clone().requires_grad_()
