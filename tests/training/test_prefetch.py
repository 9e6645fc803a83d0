"""Batches on the device: all of them, in order, without their images afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.training.prefetch import DevicePrefetch
from tests.support.step_batches import CPU, GALLERY, make_batch


def test_batches_arrive_in_order_with_the_time_of_waiting_for_each() -> None:
    def load() -> Iterator[PairBatch]:
        for number in range(3):
            time.sleep(0.05)
            yield replace(make_batch(), number=number)

    found = list(DevicePrefetch(CPU)(load()))
    assert [batch.number for batch, _ in found] == [0, 1, 2]
    assert all(0.04 < waited_s < 5 for _, waited_s in found)
    assert torch.equal(found[1][0].queries, make_batch().queries)


def test_a_batch_without_images_keeps_its_counts_and_not_their_memory() -> None:
    batch = make_batch(gallery=GALLERY, masked=[1], masked_gallery=[0, 2])
    bare = batch.to(CPU).without_images()
    assert (bare.pairs_masked, bare.gallery_masked) == (1, 2)
    assert bare.queries.untyped_storage().nbytes() == 0
    assert bare.references.untyped_storage().nbytes() == 0
    assert bare.gallery is None
