"""References without a query, as PairLoader loads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from s4g_ray.data.augmentation import augment_reference, recompress
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.images import load_raw, resize
from s4g_ray.data.pair_loader import PairBatch
from s4g_ray.errors import BadImageError
from tests.conftest import NUM_TRAIN, SIZE
from tests.support.sample_images import config, loader, picture

PAIRS = np.arange(12).reshape(3, 4)
GALLERY = np.array(
    [[96, 97, 98, 99], [100, 96, 102, 103], [104, 105, -1, 96]]
)  # references of the test split


def gallery_of(batch: PairBatch) -> Tensor:
    assert batch.gallery is not None
    return batch.gallery


def test_a_gallery_image_looks_the_same_whatever_loads_it_and_other_in_another_epoch(
    synthetic: GeoDataset,
) -> None:
    one = list(loader(synthetic).load(PAIRS, PAIRS, epoch=2, gallery_ids=GALLERY))
    halves = list(
        loader(synthetic).load(PAIRS[:, 2:], PAIRS[:, 2:], epoch=2, gallery_ids=GALLERY[:, 2:])
    )
    other = list(loader(synthetic).load(PAIRS, PAIRS, epoch=3, gallery_ids=GALLERY))
    for a, half, c in zip(one, halves, other, strict=True):
        assert gallery_of(a).shape == (4, 3, SIZE, SIZE)
        assert torch.equal(gallery_of(a)[2:], gallery_of(half))
        assert not torch.equal(gallery_of(a), gallery_of(c))
    assert torch.equal(gallery_of(one[0])[0], gallery_of(one[1])[1])  # the same image


def test_pairs_are_the_same_with_and_without_gallery_images(synthetic: GeoDataset) -> None:
    with_gallery = list(loader(synthetic).load(PAIRS, PAIRS, epoch=1, gallery_ids=GALLERY))
    without = list(loader(synthetic).load(PAIRS, PAIRS, epoch=1))
    for a, b in zip(with_gallery, without, strict=True):
        assert torch.equal(a.queries, b.queries)
        assert torch.equal(a.references, b.references)
        assert (b.gallery, b.gallery_ids, b.gallery_valid, b.gallery_masked) == (
            None,
            None,
            None,
            0,
        )


def test_a_gallery_image_has_draws_of_its_own(synthetic: GeoDataset) -> None:
    """A reference whose id is that of a query in the batch must not repeat that pair's augmentation."""
    (batch,) = loader(synthetic).load(PAIRS[:1], PAIRS[:1], epoch=1, gallery_ids=PAIRS[:1])
    assert all(not torch.equal(gallery_of(batch)[i], batch.references[i]) for i in range(4))


def test_what_is_not_there_is_blank_and_masked_and_what_is_corrupt_fails_by_name_or_is_listed(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n")
    ids = np.array([[NUM_TRAIN, -1, NUM_TRAIN + 5, NUM_TRAIN + 6]])

    def load(mode: str) -> list[PairBatch]:
        made = loader(synthetic, on_bad_image=mode)
        made.references.uris[NUM_TRAIN + 5] = str(broken)
        return list(made.load(PAIRS[:1], PAIRS[:1], epoch=1, gallery_ids=ids))

    with pytest.raises(BadImageError, match=rf"id {NUM_TRAIN + 5}, .*broken\.png"):
        load("fail")
    (batch,) = load("skip")
    assert batch.gallery_valid is not None
    assert batch.gallery_valid.tolist() == [True, False, False, True]
    assert batch.valid.all()
    assert [bool(image.any()) for image in gallery_of(batch)] == [True, False, False, True]
    assert batch.gallery_masked == 1
    assert len(batch.bad_images) == 1
    assert "broken.png" in batch.bad_images[0]
    with pytest.raises(KeyError, match="777"):
        list(loader(synthetic).load(PAIRS[:1], PAIRS[:1], epoch=1, gallery_ids=np.array([[777]])))


def test_without_augmentation_it_is_the_stored_image(synthetic: GeoDataset) -> None:
    made = loader(synthetic, augment=config())
    (batch,) = made.load(PAIRS[:1], PAIRS[:1], epoch=1, gallery_ids=GALLERY[:1])
    for i, row in enumerate(GALLERY[0].tolist()):
        assert torch.equal(gallery_of(batch)[i], load_raw(made.references, row))


@pytest.mark.parametrize("how", ["none", "panorama", "planar", "reference", "query"])
def test_it_is_flipped_as_often_as_pairs_and_turned_where_references_are(how: str) -> None:
    image = picture(1)
    views = {"": image, **{str(k): torch.rot90(image, k, (-2, -1)) for k in (1, 2, 3)}}
    views |= {
        f"{name} flipped": torch.rot90(image.flip(-1), int(name or 0), (-2, -1))
        for name in list(views)
    }
    cfg, rng = (
        config(flip_probability=0.5, rotate=how, rotate_probability=0.75),
        np.random.default_rng(0),
    )
    counts = dict.fromkeys(views, 0)
    for _ in range(1600):
        out = augment_reference(image, cfg, rng)
        counts[next(name for name, view in views.items() if torch.equal(view, out))] += 1
    turned = 0.0 if how in ("none", "query") else 0.75
    for name, count in counts.items():
        expected = 1600 * 0.5 * (turned / 3 if name[:1].isdigit() else 1 - turned)
        assert abs(count - expected) <= 5 * np.sqrt(expected)


@pytest.mark.parametrize("setting", ["color", "blur", "dropout"])
def test_each_probability_switches_its_operation(setting: str) -> None:
    changed = augment_reference(
        picture(1), config(**{f"{setting}_probability": 1.0}), np.random.default_rng(4)
    )
    assert not torch.equal(changed, picture(1))


def test_jpeg_compression_comes_before_it_is_sized() -> None:
    big = picture(1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    cfg = config(jpeg_probability=1.0, jpeg_quality=(20, 20))
    out = augment_reference(
        big, cfg, np.random.default_rng(0), lambda image: resize(image, (24, 24))
    )
    assert torch.equal(out, resize(recompress(big, 20), (24, 24)))
