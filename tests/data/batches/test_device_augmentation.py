from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from s4g_ray.config.data_schema import AugmentConfig, Size
from s4g_ray.data.batches import device_augmentation
from s4g_ray.data.batches.augmentation import augment_pair, augment_reference
from s4g_ray.data.batches.augmentation_draws import (
    OPERATIONS,
    BatchDraws,
    ImageDraws,
    draw_pair,
    draw_reference,
)
from s4g_ray.data.batches.device_augmentation import augment_batch
from tests.support.sample_images import augment_config, make_photo

WIDE = (26, 50)  # 4 does not divide the width
SQUARE = (33, 33)
NUM_IMAGES = 24

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(number: int) -> np.random.Generator:
    return np.random.default_rng((5, number))


def make_images(count: int, size: Size) -> Tensor:
    """Photographs, and noise, which has all colours and edges."""
    noise = torch.Generator().manual_seed(0)
    images = [
        make_photo(number, size)
        if number % 2
        else torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=noise)
        for number in range(count)
    ]
    return torch.stack(images)


def augment_both(
    cfg: AugmentConfig, query_size: Size, reference_size: Size, count: int = NUM_IMAGES
) -> list[tuple[Tensor, Tensor]]:
    """Augment pairs as a batch, and one by one as the loader does, with the same draws.

    Returns (batch, one by one) of the queries and of the references.
    """
    queries = make_images(count, query_size)
    references = make_images(count, reference_size)
    draws = [draw_pair(cfg, generator(i), query_size, reference_size) for i in range(count)]
    pairs = [augment_pair(queries[i], references[i], cfg, generator(i)) for i in range(count)]
    views = []
    for view, images in enumerate((queries, references)):
        packed = BatchDraws.from_images([both[view] for both in draws], images.shape[-1])
        views.append((augment_batch(images, packed), torch.stack([pair[view] for pair in pairs])))
    return views


def difference(found: Tensor, wanted: Tensor) -> Tensor:
    return (found.int() - wanted.int()).abs()


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ({"color_probability": 1.0}, 1),
        ({"color_probability": 0.5, "color_strength": 0.5}, 1),
        ({"blur_probability": 1.0}, 1),
        ({"dropout_probability": 1.0}, 0),
        ({"flip_probability": 0.5}, 0),
        ({"rotate": "panorama", "rotate_probability": 0.75}, 0),
        ({"rotate": "reference", "rotate_probability": 0.75}, 0),
    ],
)
def test_each_operation_equals_that_of_the_loader_up_to_rounding(
    values: dict[str, Any], levels: int
) -> None:
    for found, wanted in augment_both(augment_config(**values), WIDE, SQUARE):
        assert difference(found, wanted).max() <= levels
        assert (difference(found, wanted) > 0).float().mean() < 1e-3


@pytest.mark.parametrize("rotate", ["planar", "query"])
def test_square_views_turn_as_in_the_loader(rotate: str) -> None:
    cfg = augment_config(rotate=rotate, rotate_probability=0.75, flip_probability=0.5)
    for found, wanted in augment_both(cfg, (21, 21), SQUARE):
        assert torch.equal(found, wanted)


def test_all_operations_together_equal_the_loaders_in_their_order() -> None:
    """Dropout is flipped and turned with the image; colours count what blur and dropout change."""
    cfg = augment_config(
        color_probability=0.7,
        blur_probability=0.7,
        dropout_probability=0.7,
        flip_probability=0.5,
        rotate="panorama",
        rotate_probability=0.75,
    )
    for found, wanted in augment_both(cfg, WIDE, SQUARE, 40):
        assert difference(found, wanted).max() <= 2
        assert (difference(found, wanted) > 0).float().mean() < 1e-3


def test_with_compression_the_mean_difference_is_below_a_level() -> None:
    cfg = AugmentConfig(rotate="panorama")
    unlike = AugmentConfig(rotate="panorama", flip_probability=0)
    photos = torch.stack([make_photo(i, (40, 40)) for i in range(NUM_IMAGES)])

    def augment(cfg: AugmentConfig) -> Tensor:
        draws = [draw_reference(cfg, generator(i), (40, 40)) for i in range(NUM_IMAGES)]
        assert any("jpeg" in its for its in draws)
        return augment_batch(photos, BatchDraws.from_images(draws, 40))

    one_by_one = [augment_reference(photo, cfg, generator(i)) for i, photo in enumerate(photos)]
    wanted = torch.stack(one_by_one)
    assert difference(augment(cfg), wanted).float().mean() < 1
    assert difference(augment(unlike), wanted).float().mean() > 10


def test_draws_of_references_are_those_of_the_loader() -> None:
    cfg = augment_config(dropout_probability=0.5, flip_probability=0.5, rotate="reference")
    images = make_images(NUM_IMAGES, SQUARE)
    draws = [draw_reference(cfg, generator(i), SQUARE) for i in range(NUM_IMAGES)]
    found = augment_batch(images, BatchDraws.from_images(draws, 33))
    for i in range(NUM_IMAGES):
        assert torch.equal(found[i], augment_reference(images[i], cfg, generator(i)))


EACH: ImageDraws = {
    "flip_first": (),
    "jpeg": (93,),
    "brightness": (1.1,),
    "contrast": (0.9,),
    "saturation": (1.1,),
    "hue": (0.1,),
    "blur": (0.8,),
    "sharpen": (1.6,),
    "filter": (*[0.04] * 24, 0.05),
    "grid": (8, 3, 2, 5),
    "holes": (1, 2, 5, 3, 7, 4, 5, 6),
    "flip": (),
    "turn_90": (),
    "turn_180": (),
    "turn_270": (),
    "roll": (5,),
    "view": (3, 20),
}


def test_images_without_draws_keep_every_bit() -> None:
    assert tuple(EACH) == OPERATIONS
    images = make_images(4, SQUARE)
    draws = BatchDraws.from_images([{}, EACH, {}, {"flip": ()}], 33)
    found = augment_batch(images, draws)
    assert torch.equal(found[[0, 2]], images[[0, 2]])
    assert torch.equal(found[3], images[3].flip(-1))
    assert not torch.equal(found[1], images[1])
    assert torch.equal(images, make_images(4, SQUARE))


def test_a_rolled_batch_is_cropped_to_its_middle_columns() -> None:
    images = make_images(3, WIDE)
    found = augment_batch(
        images, BatchDraws.from_images([{"roll": (7,)}, {}, {"roll": (-60,)}], 20)
    )
    for i, shift in enumerate((7, 0, -60)):
        assert torch.equal(found[i], images[i].roll(shift, -1)[..., 15:35])


@pytest.mark.parametrize("interleaved", [False, True])
def test_results_and_layout_do_not_depend_on_how_images_lie_in_memory(interleaved: bool) -> None:
    images = make_images(NUM_IMAGES, SQUARE)
    draws = BatchDraws.from_images(
        [draw_reference(AugmentConfig(), generator(i), SQUARE) for i in range(NUM_IMAGES)], 33
    )
    layout = torch.channels_last if interleaved else torch.contiguous_format
    found = augment_batch(images.contiguous(memory_format=layout), draws)
    assert found.is_contiguous(memory_format=layout)
    assert torch.equal(found, augment_batch(images, draws))


class CallCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of torch's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_calls = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_calls_does_not_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def count_calls(num_images: int) -> int:
        draws = BatchDraws.from_images([EACH for _ in range(num_images)], 33)
        images = make_images(num_images, SQUARE)
        augment_batch(images, draws)
        counter = CallCounter()
        with counter:
            augment_batch(images, draws)
        return counter.num_calls

    assert count_calls(2) == count_calls(9) > 100
    monkeypatch.setattr(device_augmentation, "IMAGES_AT_ONCE", 3)
    assert count_calls(9) > 2 * count_calls(3)


def test_results_do_not_depend_on_how_many_images_are_changed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = make_images(NUM_IMAGES, SQUARE)
    draws = BatchDraws.from_images(
        [draw_reference(AugmentConfig(), generator(i), SQUARE) for i in range(NUM_IMAGES)], 33
    )
    wanted = augment_batch(images, draws)
    monkeypatch.setattr(device_augmentation, "IMAGES_AT_ONCE", 3)
    assert difference(augment_batch(images, draws), wanted).max() <= 1


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors on torch's `meta` device have no values: reading one, or mixing it with one on the
    CPU, fails.
    """
    images = torch.empty(5, 3, *SQUARE, dtype=torch.uint8, device="meta")
    draws = BatchDraws.from_images([EACH, {}, EACH, EACH, EACH], 20)
    found = augment_batch(images, draws.move(partial(torch.Tensor.to, device="meta")))
    assert (tuple(found.shape), found.device.type) == ((5, 3, 33, 20), "meta")


@pytest.mark.gpu
@pytest.mark.parametrize("published", [False, True])
def test_a_gpu_gives_the_result_of_the_cpu_and_is_never_waited_for(published: bool) -> None:
    cfg = AugmentConfig(published=published)
    draws = BatchDraws.from_images(
        [draw_reference(cfg, generator(i), SQUARE) for i in range(64)], 33
    )
    images = make_images(64, SQUARE)
    wanted = augment_batch(images, draws)
    on_gpu = draws.move(torch.Tensor.cuda)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        augment_batch(images.cuda(), on_gpu)  # copies the constants
        moved = images.cuda()
        torch.cuda.set_sync_debug_mode("error")
        found = augment_batch(moved, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.allow_tf32 = before
    assert difference(found.cpu(), wanted).float().mean() < 0.01
