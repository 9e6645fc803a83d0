from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from s4g_ray.data.batches.augmentation import recompress
from s4g_ray.data.batches.jpeg_simulation import simulate_jpeg
from tests.support.sample_images import make_photo

pytestmark = pytest.mark.usefixtures("one_thread")


def compress_by_pillow(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(buffer) as compressed:
        return torch.from_numpy(np.array(compressed)).permute(2, 0, 1)


def mean_difference(one: Tensor, other: Tensor) -> float:
    return float((one.int() - other.int()).abs().float().mean())


@pytest.mark.parametrize("size", [(48, 64), (35, 83), (9, 8)])
def test_each_image_is_compressed_at_its_own_quality_as_by_libjpeg(size: tuple[int, int]) -> None:
    """Sizes that 16, 8 and 2 do not divide pad the borders as libjpeg does."""
    qualities = [10, 49, 50, 75, 90, 95, 100]
    images = torch.stack([make_photo(seed, size) for seed in range(len(qualities))])
    found = simulate_jpeg(images, torch.tensor(qualities, dtype=torch.float32))
    for image, quality, made in zip(images, qualities, found, strict=True):
        by_pillow = compress_by_pillow(image, quality)
        assert mean_difference(made, by_pillow) < 0.5, quality
        assert mean_difference(image, by_pillow) > 0.75, quality


def test_the_result_is_within_a_level_of_the_loaders_compression_on_average() -> None:
    """simplejpeg's encoder has a coarser cosine transform than Pillow's."""
    qualities = list(range(90, 101))
    images = torch.stack([make_photo(seed, (64, 96)) for seed in qualities])
    found = simulate_jpeg(images, torch.tensor(qualities, dtype=torch.float32))
    wanted = [recompress(image, quality) for image, quality in zip(images, qualities, strict=True)]
    assert mean_difference(found, torch.stack(wanted)) < 1
    assert mean_difference(found, images) > 1.5


def test_the_worse_the_quality_the_more_is_lost() -> None:
    image = make_photo(3, (64, 64)).expand(4, 3, 64, 64)
    found = simulate_jpeg(image, torch.tensor([100.0, 90.0, 60.0, 10.0]))
    lost = [mean_difference(made, image[0]) for made in found]
    assert lost == sorted(lost)
    assert lost[3] > 5 * lost[0] > 0


def test_grey_and_plain_images_stay_nearly_what_they_are() -> None:
    plain = torch.tensor([200, 30, 90], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 24, 40)
    assert (simulate_jpeg(plain, torch.tensor([95.0])).int() - plain.int()).abs().max() <= 2
    grey = make_photo(4, (32, 32)).float().mean(0, keepdim=True).expand(1, 3, 32, 32).byte()
    found = simulate_jpeg(grey, torch.tensor([92.0])).int()
    assert (found.amax(1) - found.amin(1)).max() == 0
