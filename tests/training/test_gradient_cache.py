"""Chunks of a batch, and the gradient that they give together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s4g_ray.training.gradient_cache import Chunk, backward_in_chunks, divide_batch


@given(st.integers(1, 40), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_chunks_take_each_pair_and_each_gallery_reference_once_and_in_order(
    num_pairs: int, num_gallery: int, size: int | None
) -> None:
    chunks = divide_batch(num_pairs, num_gallery, size)
    pairs = [list(range(num_pairs))[chunk.pairs] for chunk in chunks]
    gallery = [list(range(num_gallery))[chunk.gallery] for chunk in chunks]
    assert list(itertools.chain(*pairs)) == list(range(num_pairs))
    assert list(itertools.chain(*gallery)) == list(range(num_gallery))
    assert {len(p) for p in pairs[:-1]} <= {size}
    assert 1 <= len(pairs[-1]) <= (size or num_pairs)
    assert max(map(len, gallery)) - min(map(len, gallery)) <= 1
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    all_rows = name_rows(range(num_pairs), range(num_gallery))
    for chunk, chunk_pairs, chunk_gallery in zip(chunks, pairs, gallery, strict=True):
        assert [all_rows[row] for row in chunk.rows] == name_rows(chunk_pairs, chunk_gallery)


def name_rows(pairs: Iterable[int], gallery: Iterable[int]) -> list[tuple[str, int]]:
    """Name embeddings by kind and number: those of queries, references, gallery references."""
    pairs = list(pairs)
    rows = [("query", i) for i in pairs]
    rows += [("reference", i) for i in pairs]
    rows += [("gallery", i) for i in gallery]
    return rows


class Linear:
    """A one-layer encoder of stored inputs, which records its passes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.inputs = torch.randn(2 * 7 + 3, 4, dtype=torch.float64)
        self.weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        self.log_scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        self.passes: list[tuple[int, bool]] = []  # number of the chunk, whether with a graph

    def embed(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        self.passes.append((chunk.number, torch.is_grad_enabled()))
        return torch.tanh(self.inputs[chunk.rows] @ self.weight), self.log_scale.exp()

    def backward(self, rows: Tensor, scale: Tensor) -> float:
        """Compute a loss that depends on all pairs of rows; return its value."""
        logits = scale * rows @ rows.T * torch.arange(len(rows))
        loss = torch.logsumexp(logits, dim=1).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8])
def test_chunks_give_the_loss_and_the_gradient_of_all_rows_at_once(size: int) -> None:
    whole = Linear()
    parts = Linear()
    all_rows = torch.arange(len(whole.inputs))
    wanted = whole.backward(*whole.embed(Chunk(0, slice(0), slice(0), all_rows)))
    chunks = divide_batch(7, 3, size)
    found = backward_in_chunks(chunks, parts.embed, parts.backward)
    assert found == pytest.approx(wanted, rel=1e-12)
    for a, b in ((parts.weight, whole.weight), (parts.log_scale, whole.log_scale)):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    assert whole.log_scale.grad != 0
    passes = [(0, True)]
    if size < 7:
        numbers = range(len(chunks))
        passes = [(n, False) for n in numbers] + [(n, True) for n in numbers]
    assert parts.passes == passes


def test_only_the_last_chunks_backward_pass_synchronises_ranks() -> None:
    linear = Linear()
    log = []

    class NoSync:
        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *_: object) -> None:
            log.append("leave")

    def embed(chunk: Chunk) -> tuple[Tensor, Tensor]:
        log.append(f"{chunk.number} {'graph' if torch.is_grad_enabled() else 'none'}")
        return linear.embed(chunk)

    backward_in_chunks(divide_batch(7, 3, 3), embed, linear.backward, NoSync)
    first = ["0 none", "1 none", "2 none"]
    assert log == [*first, "enter", "0 graph", "leave", "enter", "1 graph", "leave", "2 graph"]


def test_the_gradient_is_added_to_gradients_from_before() -> None:
    once = Linear()
    twice = Linear()
    backward_in_chunks(divide_batch(7, 3, 3), once.embed, once.backward)
    for _ in range(2):
        backward_in_chunks(divide_batch(7, 3, 3), twice.embed, twice.backward)
    assert once.weight.grad is not None
    torch.testing.assert_close(twice.weight.grad, 2 * once.weight.grad)
