"""Compute the gradient of a batch in chunks, for activations that exceed memory (GradCache).

The loss needs the embeddings of all pairs at once, but not their activations. So the chunks are
first embedded without a graph. The loss of all embeddings gives the gradient of each embedding.
Then the chunks are embedded again, with a graph, and these gradients are propagated through it.
This costs one more forward pass. Source: arXiv 2101.06983, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Chunk:
    """The share of one pass in a batch of b pairs and e gallery references."""

    number: int
    pairs: slice
    gallery: slice
    # rows of the batch's embeddings [2 b + e, D]: of the chunk's queries, references and gallery
    rows: Tensor


def divide_batch(num_pairs: int, num_gallery: int, chunk_pairs: int | None) -> list[Chunk]:
    """Divide a batch into chunks of chunk_pairs pairs; the last chunk has the remainder.

    None: one chunk of all pairs. Gallery references are spread evenly over the chunks.
    """
    size = chunk_pairs or num_pairs
    starts = range(0, num_pairs, size)
    num_chunks = len(starts)
    query_rows = torch.arange(num_pairs)
    gallery_rows = 2 * num_pairs + torch.arange(num_gallery)
    chunks = []
    for number, start in enumerate(starts):
        pairs = slice(start, min(start + size, num_pairs))
        first = number * num_gallery // num_chunks
        last = (number + 1) * num_gallery // num_chunks
        gallery = slice(first, last)
        queries = query_rows[pairs]
        rows = torch.cat([queries, num_pairs + queries, gallery_rows[gallery]])
        chunks.append(Chunk(number, pairs, gallery, rows))
    return chunks


def backward_in_chunks(
    chunks: Sequence[Chunk],
    embed: Callable[[Chunk], tuple[Tensor, Tensor]],
    backward: Callable[[Tensor, Tensor], Result],
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Result:
    """Add the gradient of the loss over all chunks to the parameters' gradients.

    embed(chunk) returns rows[n, D] and the scale. It is called twice for each chunk and must return
    the same values both times, random draws included. backward(rows[N, D], scale) computes the
    loss and calls its backward(); what it returns is returned. no_sync is the context of all
    backward passes but the last. In the last, DDP reduces the sum of the gradients, once.
    """
    if len(chunks) == 1:
        return backward(*embed(chunks[0]))
    rows, scale = _embed_without_graph(chunks, embed)
    result = backward(rows, scale)
    if rows.grad is None or scale.grad is None:
        raise RuntimeError(
            "the loss depends on the embeddings and on the scale, but one of them has no gradient"
        )
    for chunk in chunks:
        is_last = chunk is chunks[-1]
        with nullcontext() if is_last else no_sync():
            chunk_rows, chunk_scale = embed(chunk)
            roots = [chunk_rows]
            gradients = [rows.grad[chunk.rows.to(rows.device)]]
            if is_last:  # the scale's gradient was computed for all chunks: propagate it once
                roots.append(chunk_scale)
                gradients.append(scale.grad)
            torch.autograd.backward(roots, gradients)
    return result


def _embed_without_graph(
    chunks: Sequence[Chunk], embed: Callable[[Chunk], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return all chunks' rows[N, D], in the batch's order, and the scale, as autograd leaves."""
    with torch.no_grad():
        embedded = [embed(chunk) for chunk in chunks]
        rows = torch.cat([chunk_rows for chunk_rows, _ in embedded])
        order = torch.cat([chunk.rows for chunk in chunks]).argsort().to(rows.device)
        _, scale = embedded[0]
        return rows[order].requires_grad_(), scale.clone().requires_grad_()
