"""Batches whose augmentation is left to the device, against those that the loader augments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from s4g_ray.config.data_schema import AugmentConfig
from s4g_ray.data.batches.augmentation_draws import BatchDraws
from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.pair_loader import PairLoader
from tests.conftest import SIZE
from tests.support.sample_images import augment_config, loader, with_uris

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = np.array([[0, 1, -1, 3], [4, 5, 6, 7], [8, -1, 10, 11]])
GALLERY = np.array([[96, -1, 97], [98, 99, 100], [101, 3, 102]])
EXACT = {  # operations whose results the device does not round
    "dropout_probability": 0.5,
    "flip_probability": 0.5,
    "rotate": "panorama",
    "rotate_probability": 0.75,
}


def load(made: PairLoader, epoch: int = 2) -> list[PairBatch]:
    return list(made.load(IDS, IDS, epoch=epoch, gallery_ids=GALLERY))


def images_of(batch: PairBatch) -> list[Tensor]:
    assert batch.gallery is not None
    return [batch.queries, batch.references, batch.gallery]


def draws_of(batch: PairBatch) -> list[BatchDraws]:
    found = [batch.query_draws, batch.reference_draws, batch.gallery_draws]
    return [draws for draws in found if draws is not None]


def assert_same(found: PairBatch, wanted: PairBatch, levels: int = 0) -> None:
    """Compare all that training sees."""
    for one, other in zip(images_of(found), images_of(wanted), strict=True):
        assert one.shape == other.shape
        assert (one.int() - other.int()).abs().max() <= levels
    assert torch.equal(found.valid, wanted.valid)
    assert found.gallery_valid is not None
    assert wanted.gallery_valid is not None
    assert torch.equal(found.gallery_valid, wanted.gallery_valid)
    assert np.array_equal(found.query_ids, wanted.query_ids)
    assert found.bad_images == wanted.bad_images
    assert found.pairs_masked == wanted.pairs_masked
    assert found.gallery_masked == wanted.gallery_masked


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"query_fov_deg": 90},
        {"query_heading": "random"},
        {"query_heading": "random", "query_fov_deg": 200},
        {"query_fov_deg": [180, 180]},
        {"query_heading": "random", "query_fov_deg": [90, 360]},
    ],
)
def test_a_batch_augmented_later_equals_one_augmented_by_the_loader(
    synthetic: GeoDataset, data: dict[str, Any]
) -> None:
    """The panorama is cropped last: what is rolled into sight must be there."""
    augment = augment_config(**EXACT)
    raw = load(loader(synthetic, augment=augment, on_device=True, **data))
    for batch, wanted in zip(raw, load(loader(synthetic, augment=augment, **data)), strict=True):
        assert len(draws_of(batch)) == 3
        assert not torch.equal(batch.references, wanted.references)
        assert_same(batch.augment(), wanted)
        assert draws_of(batch.augment()) == []
        assert batch.augment().augment().queries.shape == wanted.queries.shape


def test_colours_and_sharpness_differ_by_rounding_alone(synthetic: GeoDataset) -> None:
    augment = AugmentConfig(jpeg_probability=0, rotate="panorama")
    raw = load(loader(synthetic, augment=augment, on_device=True))
    for batch, wanted in zip(raw, load(loader(synthetic, augment=augment)), strict=True):
        assert_same(batch.augment(), wanted, levels=1)


@pytest.mark.parametrize("heading", [0.0, 90.0, 211.0])
def test_the_published_form_is_the_same_by_the_loader_and_later(
    synthetic: GeoDataset, heading: float
) -> None:
    augment = augment_config(published=True, **EXACT)

    def load_turned(*, on_device: bool) -> list[PairBatch]:
        made = loader(synthetic, augment=augment, on_device=on_device, query_heading="known")
        headings = np.full(len(made.queries), heading, np.float32)
        made.queries = replace(made.queries, headings=headings)
        return load(made)

    raw = load_turned(on_device=True)
    operations = {name for batch in raw for draws in draws_of(batch) for name, *_ in draws.steps}
    assert {"flip_first", "grid", "holes", "roll"} <= operations
    for batch, wanted in zip(raw, load_turned(on_device=False), strict=True):
        assert_same(batch.augment(), wanted)


@pytest.mark.parametrize("published", [None, True])
def test_draws_depend_on_seed_epoch_and_id_alone(
    synthetic: GeoDataset, published: bool | None
) -> None:
    made = loader(synthetic, augment=AugmentConfig(published=published), on_device=True)
    whole = load(made)
    halves = list(made.load(IDS[:, :2], IDS[:, :2], epoch=2))
    other = load(made, epoch=3)
    for a, b, c in zip(whole, halves, other, strict=True):
        assert torch.equal(a.augment().references[:2], b.augment().references)
        assert torch.equal(a.references, c.references)
        assert not torch.equal(a.augment().references, c.augment().references)


def test_processes_send_the_same_images_and_draws_as_threads(synthetic: GeoDataset) -> None:
    view: dict[str, Any] = {"query_heading": "random", "query_fov_deg": [90, 360]}
    with loader(synthetic, num_processes=1, on_device=True, **view) as made:
        found = load(made)
    threads = loader(synthetic, on_device=True, **view)
    for batch, wanted in zip(found, load(threads), strict=True):
        assert_same(batch, wanted)
        assert batch.queries.is_contiguous(memory_format=torch.channels_last)
        for one, other in zip(draws_of(batch), draws_of(wanted), strict=True):
            assert torch.equal(one.packed, other.packed)
            assert replace(one, packed=other.packed) == other


def test_empty_slots_and_bad_images_stay_blank(synthetic: GeoDataset, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")

    def load_damaged(on_device: bool) -> PairBatch:
        made = loader(synthetic, on_bad_image="skip", on_device=on_device)
        made.queries = with_uris(made.queries, {1: tmp_path / "broken.png"})
        made.references = with_uris(made.references, {97: tmp_path / "broken.png"})
        return load(made)[0]

    raw = load_damaged(on_device=True)
    batch = raw.augment()
    wanted = load_damaged(on_device=False)
    assert (batch.valid.tolist(), batch.pairs_masked) == ([True, False, False, True], 1)
    assert torch.equal(batch.valid, wanted.valid)
    assert batch.bad_images == wanted.bad_images
    assert batch.gallery_masked == wanted.gallery_masked == 1
    for images, valid in zip(
        images_of(batch), (batch.valid, batch.valid, batch.gallery_valid), strict=True
    ):
        assert valid is not None
        assert images.flatten(1).any(1).tolist() == valid.tolist()
    for draws in draws_of(raw)[:2]:
        for _, rows, _ in draws.unpack():
            assert not {1, 2} & set(rows.tolist())


def test_all_tensors_of_a_batch_move_and_masked_images_are_counted_before(
    synthetic: GeoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loader(synthetic, on_bad_image="skip", on_device=True)
    made.queries = with_uris(made.queries, {0: Path("nowhere.png")})
    made.references = with_uris(made.references, {96: Path("nowhere.png")})
    batch = load(made)[0]
    moved = batch.to(torch.device("meta"))
    tensors = [*images_of(moved), moved.valid, *[draws.packed for draws in draws_of(moved)]]
    assert moved.gallery_valid is not None
    assert {tensor.device.type for tensor in (*tensors, moved.gallery_valid)} == {"meta"}
    assert (moved.pairs_masked, moved.gallery_masked) == (1, 1)  # `meta` has no values to count
    assert tuple(moved.augment().queries.shape) == (4, 3, SIZE, SIZE)
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    assert_same(batch.pin(), batch)
    assert len(pinned) == 8


@pytest.mark.gpu
def test_a_pinned_batch_is_augmented_on_the_gpu_as_on_the_cpu(synthetic: GeoDataset) -> None:
    for batch in load(loader(synthetic, on_device=True)):
        on_gpu = batch.pin().to(torch.device("cuda")).augment()
        assert on_gpu.queries.is_cuda
        found = on_gpu.to(torch.device("cpu"))
        for one, other in zip(images_of(found), images_of(batch.augment()), strict=True):
            assert (one.int() - other.int()).abs().float().mean() < 0.01


@pytest.mark.parametrize(
    ("device", "published", "on_cuda", "on_cpu"),
    [
        ("auto", False, True, False),
        ("auto", True, False, False),  # there JPEG comes before the resizing
        ("device", True, True, True),
        ("cpu", False, False, False),
    ],
)
def test_images_are_augmented_on_the_device_where_it_is_a_gpu_or_as_configured(
    device: str, published: bool, on_cuda: bool, on_cpu: bool
) -> None:
    cfg = augment_config(device=device, published=published)
    assert (cfg.is_on_device("cuda"), cfg.is_on_device("cpu")) == (on_cuda, on_cpu)
