from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s4g_ray.training.gradient_cache import Chunk, backward_in_chunks, divide


@given(st.integers(1, 40), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_chunks_take_each_pair_and_each_gallery_reference_once_and_in_order(
    num_pairs: int, num_gallery: int, size: int | None
) -> None:
    chunks = divide(num_pairs, num_gallery, size)
    pairs = [list(range(num_pairs))[chunk.pairs] for chunk in chunks]
    gallery = [list(range(num_gallery))[chunk.gallery] for chunk in chunks]
    assert list(itertools.chain(*pairs)) == list(range(num_pairs))
    assert list(itertools.chain(*gallery)) == list(range(num_gallery))
    assert {len(p) for p in pairs[:-1]} <= {size}
    assert 1 <= len(pairs[-1]) <= (size or num_pairs)
    assert max(map(len, gallery)) - min(map(len, gallery)) <= 1
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    for chunk, mine, more in zip(chunks, pairs, gallery, strict=True):
        of_all = [("q", i) for i in range(num_pairs)] + [("r", i) for i in range(num_pairs)]
        of_all += [("g", i) for i in range(num_gallery)]
        wanted = [("q", i) for i in mine] + [("r", i) for i in mine] + [("g", i) for i in more]
        assert [of_all[row] for row in chunk.rows] == wanted


class Linear:
    """rows = inputs @ weight for the rows of a chunk, with a count of passes by kind."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.inputs = torch.randn(2 * 7 + 3, 4, dtype=torch.float64)
        self.weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        self.log_scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        self.passes: list[tuple[int, bool]] = []  # chunk, with a graph

    def embed(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        self.passes.append((chunk.number, torch.is_grad_enabled()))
        return torch.tanh(self.inputs[chunk.rows] @ self.weight), self.log_scale.exp()

    def backward(self, rows: Tensor, scale: Tensor) -> float:
        """Of a loss in which each row meets each other."""
        loss = (
            torch.logsumexp(scale * rows @ rows.T * torch.arange(len(rows)), dim=1).square().sum()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8])
def test_chunks_give_the_loss_and_the_gradient_of_all_rows_at_once(size: int) -> None:
    whole, parts = Linear(), Linear()
    all_rows = torch.arange(len(whole.inputs))
    wanted = whole.backward(*whole.embed(Chunk(0, slice(0), slice(0), all_rows)))
    chunks = divide(7, 3, size)
    assert backward_in_chunks(chunks, parts.embed, parts.backward) == pytest.approx(
        wanted, rel=1e-12
    )
    for a, b in ((parts.weight, whole.weight), (parts.log_scale, whole.log_scale)):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    assert whole.log_scale.grad != 0
    numbers = range(len(chunks))
    once = [(0, True)]
    assert parts.passes == (
        once if size >= 7 else [(n, False) for n in numbers] + [(n, True) for n in numbers]
    )


def test_all_chunks_but_the_last_go_back_without_synchronisation() -> None:
    linear, log = Linear(), []

    class NoSync:
        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *_: object) -> None:
            log.append("leave")

    def embed(chunk: Chunk) -> tuple[Tensor, Tensor]:
        log.append(f"{chunk.number} {'graph' if torch.is_grad_enabled() else 'none'}")
        return linear.embed(chunk)

    backward_in_chunks(divide(7, 3, 3), embed, linear.backward, NoSync)
    first = ["0 none", "1 none", "2 none"]
    assert log == [*first, "enter", "0 graph", "leave", "enter", "1 graph", "leave", "2 graph"]


def test_the_gradient_is_added_to_what_is_there() -> None:
    once, twice = Linear(), Linear()
    backward_in_chunks(divide(7, 3, 3), once.embed, once.backward)
    for _ in range(2):
        backward_in_chunks(divide(7, 3, 3), twice.embed, twice.backward)
    assert once.weight.grad is not None
    torch.testing.assert_close(twice.weight.grad, 2 * once.weight.grad)
