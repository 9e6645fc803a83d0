"""Batches are decoded in order, within a limit of bytes, and without the images that are bad."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.images import load_view
from s4g_ray.encoder.embedding.decode_ahead import BufferPool, DecodeAhead, DecodedBatch
from tests.conftest import SIZE
from tests.support.sample_images import with_uris

BATCH_BYTES = 4 * SIZE * SIZE * 3


@pytest.fixture
def decoder() -> Iterator[DecodeAhead]:
    decoder = DecodeAhead(3, 2 * BATCH_BYTES, pin=False)
    yield decoder
    decoder.close()


@pytest.fixture
def table(synthetic: GeoDataset) -> ImageTable:
    return synthetic.table("queries", ["test"])


def batches_of(decoder: DecodeAhead, table: ImageTable, order: list[int]) -> Iterator[DecodedBatch]:
    data = DataConfig(uri="x", query_size=(SIZE, SIZE), reference_size=(SIZE, SIZE))
    return decoder.batches(table, np.array(order), "queries", data, seed=0, batch_size=4)


def test_batches_hold_the_images_of_their_rows_in_order(
    decoder: DecodeAhead, table: ImageTable
) -> None:
    data = DataConfig(uri="x", query_size=(SIZE, SIZE), reference_size=(SIZE, SIZE))
    order = np.random.default_rng(0).permutation(len(table))[:18].tolist()
    found = []
    for batch in batches_of(decoder, table, order):
        found.extend(batch.rows.tolist())
        for image, row in zip(batch.images, batch.rows.tolist(), strict=True):
            assert torch.equal(image, load_view(table, row, "queries", data, seed=0))
        decoder.buffers.give_back(batch.buffer)
    assert found == order


def test_bad_images_are_left_out_with_their_rows_and_reasons(
    decoder: DecodeAhead, table: ImageTable, tmp_path: Path
) -> None:
    damaged = with_uris(table, {2: tmp_path / "none.png", 5: tmp_path / "no.png"})
    found = []
    for batch in batches_of(decoder, damaged, [1, 2, 3, 4, 5]):
        found.append((batch.rows.tolist(), len(batch.images), [row for row, _ in batch.bad]))
        decoder.buffers.give_back(batch.buffer)
    assert found == [([1, 3, 4], 3, [2]), ([], 0, [5])]


def test_decoding_waits_while_the_encoder_holds_all_buffers(
    decoder: DecodeAhead, table: ImageTable
) -> None:
    batches = batches_of(decoder, table, list(range(12)))
    held = [next(batches), next(batches)]
    third: list[DecodedBatch] = []
    waiting = threading.Thread(target=lambda: third.append(next(batches)))
    waiting.start()
    waiting.join(0.2)
    assert not third
    decoder.buffers.give_back(held[0].buffer)
    waiting.join(60)
    assert third[0].rows.tolist() == [8, 9, 10, 11]


def test_a_block_that_is_given_up_gives_its_buffers_back(
    decoder: DecodeAhead, table: ImageTable
) -> None:
    batches = batches_of(decoder, table, list(range(12)))
    decoder.buffers.give_back(next(batches).buffer)
    batches.close()  # type: ignore[attr-defined]
    shape = (4, SIZE, SIZE, 3)
    assert decoder.buffers.take(shape, wait=False) is not None
    assert decoder.buffers.take(shape, wait=False) is not None
    assert decoder.buffers.take(shape, wait=False) is None


def test_buffers_of_another_shape_make_room_and_one_is_always_given() -> None:
    pool = BufferPool(100, pin=False)
    small = [pool.take((1, 4, 4, 3), wait=False) for _ in range(3)]
    assert [one is not None for one in small] == [True, True, False]
    assert small[0] is not None
    pool.give_back(small[0])
    assert pool.take((1, 4, 4, 3), wait=False) is small[0]
    for buffer in small[:2]:
        assert buffer is not None
        pool.give_back(buffer)
    assert pool.take((9, 4, 4, 3), wait=False) is not None  # alone above the limit
    assert pool.take((1, 4, 4, 3), wait=False) is None
