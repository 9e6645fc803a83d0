"""How photos are encoded: batches, threads and memory, for any number and size of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from s4g_ray.gallery.photos.encode_ahead import AHEAD_BYTES, EncodePlan, embed_ahead, plan_encoding
from s4g_ray.gallery.photos.photo import Photo

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Give torch eight threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def plan(size: int = 64, turns: int = 1, **options: int) -> EncodePlan:
    return plan_encoding((size, size), turns, device=CPU, **options)


def test_threads_are_shared_by_batches_at_once() -> None:
    assert (plan().num_calls, plan().num_threads) == (4, 2)
    assert (plan(num_photos=1).num_calls, plan(num_photos=1).num_threads) == (1, 8)
    on_gpu = plan_encoding((64, 64), 1, device=torch.device("cuda"))
    assert on_gpu.num_calls == 1
    assert on_gpu.num_views > plan().num_views


def test_few_photos_keep_all_batches_busy() -> None:
    assert plan(num_photos=8).batch_photos == 2
    assert plan(num_photos=3).batch_photos == 1
    assert plan(num_photos=1000).batch_photos == plan().batch_photos == 32


@pytest.mark.parametrize("turns", [1, 4, 360])
@pytest.mark.parametrize("size", [64, 384])
def test_what_is_decoded_ahead_fits_its_memory(size: int, turns: int) -> None:
    for photo_bytes in (0, 30_000_000):
        found = plan(size, turns, photo_bytes=photo_bytes)
        of_photo = 3 * size**2 * turns + photo_bytes
        assert found.num_ahead * of_photo <= max(AHEAD_BYTES, 2 * of_photo)
        assert found.batch_photos * turns <= max(found.num_views, turns)


def test_batches_come_in_order_with_their_embeddings() -> None:
    batches = [[Photo(f"{number}", None)] for number in range(20)]

    def embed(batch: list[Photo]) -> NDArray[np.float32]:
        return np.array([float(photo.name) for photo in batch], np.float32)

    found = list(embed_ahead(batches, embed, plan()))
    assert [batch[0].name for batch, _ in found] == [str(number) for number in range(20)]
    assert [float(vector[0]) for _, vector in found] == list(range(20))


def test_threads_of_the_encoder_leave_those_of_others_alone() -> None:
    """Two callers at once: neither sees, nor leaves, the few threads of the other's encoders."""
    inside = threading.Barrier(2)

    def embed(batch: list[Photo]) -> NDArray[np.float32]:
        return np.array([torch.get_num_threads()], np.float32)

    def call() -> tuple[list[float], int]:
        found: list[float] = []
        for _, vector in embed_ahead([[Photo("a", None)]] * 8, embed, plan()):
            if not found:
                inside.wait(60)
            found.append(float(vector[0]))
        return found, torch.get_num_threads()

    with ThreadPoolExecutor(2) as callers:
        waiting = [callers.submit(call) for _ in range(2)]
        assert [one.result(60) for one in waiting] == [([2.0] * 8, 8)] * 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 8


def test_an_error_of_the_encoder_ends_the_work() -> None:
    def embed(batch: list[Photo]) -> NDArray[np.float32]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        list(embed_ahead([[Photo("a", None)]] * 5, embed, plan()))
