from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from s4g_ray.config.data_schema import AugmentConfig, Size
from s4g_ray.data.batches.augmentation_draws import (
    OPERATIONS,
    BatchDraws,
    ImageDraws,
    Operation,
    add_field_of_view,
    draw_pair,
    draw_reference,
)
from tests.support.sample_images import augment_config

WIDE = (26, 50)  # 4 does not divide the width
SQUARE = (33, 33)


def draw_view_by_hand(rng: np.random.Generator, height: int, width: int) -> dict[str, Any]:
    """Draw a view's augmentation by the default configuration, one value after another."""
    found: dict[str, Any] = {}
    if rng.random() < 0.5:
        found["jpeg"] = (rng.integers(90, 101),)
    if rng.random() < 0.5:
        factors = [*(1 + rng.uniform(-0.15, 0.15, 3)), rng.uniform(-0.15, 0.15)]
        names = ("brightness", "contrast", "saturation", "hue")
        found |= {name: [factor] for name, factor in zip(names, factors, strict=True)}
    if rng.random() < 0.3:
        if rng.random() < 0.5:
            found["blur"] = [rng.uniform(0.3, 1.2)]
        else:
            found["sharpen"] = [1 + rng.uniform(0.2, 1.0)]
    if rng.random() < 0.3:
        if rng.random() < 0.5:
            cell = round(rng.uniform(0.125, 0.25) * height)
            found["grid"] = [cell, round(0.4 * cell), rng.integers(cell), rng.integers(cell)]
        else:
            found["holes"] = []
            for _ in range(rng.integers(10, 26)):
                side = round(rng.uniform(0.1, 0.2) * height)
                corner = [rng.integers(height - side + 1), rng.integers(width - side + 1)]
                found["holes"] += [*corner, side, side]
    return found


def as_lists(draws: ImageDraws | dict[str, Any]) -> dict[str, list[float]]:
    return {name: [float(value) for value in values] for name, values in draws.items()}


def test_draws_keep_their_order_from_version_to_version() -> None:
    """A run that resumes must meet the same images."""
    cfg = AugmentConfig(rotate="panorama")
    seen: set[str] = set()
    for seed in range(120):
        rng = np.random.default_rng(seed)
        query = draw_view_by_hand(rng, *WIDE)
        reference = draw_view_by_hand(rng, *SQUARE)
        if rng.random() < 0.5:
            query["flip"] = reference["flip"] = ()
        turns = int(rng.integers(1, 4))
        if rng.random() < 0.75:
            query["roll"] = (-round(turns * 50 / 4),)
            reference[f"turn_{90 * turns}"] = ()
        found = draw_pair(cfg, np.random.default_rng(seed), WIDE, SQUARE)
        assert [as_lists(draws) for draws in found] == [as_lists(query), as_lists(reference)]
        seen.update(query, reference)
    # of the published form, and drawn from section data
    assert seen == set(OPERATIONS) - {"flip_first", "filter", "view"}


@pytest.mark.parametrize("size", [WIDE, (140, 768)])
def test_a_view_that_is_not_square_is_not_turned(size: Size) -> None:
    cfg = augment_config(rotate="planar", rotate_probability=1.0)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"square images; set augment\.rotate=none"):
        draw_pair(cfg, rng, size, SQUARE)
    with pytest.raises(ValueError, match=r"square images; set augment\.rotate=none"):
        draw_reference(cfg, rng, size)


def test_rolls_of_an_image_add_up_and_a_view_follows() -> None:
    draws: ImageDraws = {}
    add_field_of_view(draws, 0, None)
    assert draws == {}
    add_field_of_view(draws, 7, None)
    add_field_of_view(draws, -9, None)
    assert draws == {"roll": (-2,)}
    add_field_of_view(draws, 0, (3, 9))
    assert draws == {"roll": (-2,), "view": (3, 9)}


def test_draws_are_packed_into_one_tensor_and_come_back() -> None:
    image: ImageDraws = {
        "jpeg": (93,),
        "hue": (0.1,),
        "contrast": (0.9,),
        "filter": (0.1,) * 9,
        "holes": (1, 2, 5, 3, 7, 4, 5, 6),
        "flip": (),
        "roll": (5,),
    }
    draws = BatchDraws.from_images([{}, image, {"roll": (-70_001,), "flip": ()}], 33)
    found = {name: (rows.tolist(), values.tolist()) for name, rows, values in draws.unpack()}
    assert list(found) == list(image)
    assert found["jpeg"] == ([1], [[93]])
    assert found["flip"] == ([1, 2], [[], []])
    assert found["roll"] == ([1, 2], [[5], [-70_001]])
    assert found["hue"] == ([1], [pytest.approx([0.6])])  # in sixths of the circle
    assert found["contrast"] == ([1], [pytest.approx([0.9, 0.1])])  # and 1 - contrast
    assert found["filter"] == ([1], [pytest.approx([0.1] * 9)])
    assert found["holes"] == ([1], [[1, 2, 5, 3, 7, 4, 5, 6, *[0] * 92]])


def test_filters_of_several_sizes_are_packed_apart() -> None:
    images: list[ImageDraws] = [{"filter": (float(n),) * n} for n in (9, 25, 9, 49)]
    found = [
        (name, rows.tolist(), values.tolist())
        for name, rows, values in BatchDraws.from_images(images, 9).unpack()
    ]
    assert found == [
        ("filter", [0, 2], [[9.0] * 9] * 2),
        ("filter", [1], [[25.0] * 25]),
        ("filter", [3], [[49.0] * 49]),
    ]


def test_colours_are_applied_in_the_order_of_each_image() -> None:
    orders: list[list[Operation]] = [
        ["hue", "brightness"],
        [],
        ["brightness", "saturation", "hue", "contrast"],
        ["hue", "brightness", "contrast"],
    ]
    images: list[ImageDraws] = [
        {"jpeg": (90,), **dict.fromkeys(order, (1.0,)), "flip": ()} for order in orders
    ]
    steps = [(name, rows.tolist()) for name, rows, _ in BatchDraws.from_images(images, 9).unpack()]
    assert steps[0] == ("jpeg", [0, 1, 2, 3])
    assert steps[-1] == ("flip", [0, 1, 2, 3])
    for row, order in enumerate(orders):
        assert [name for name, rows in steps[1:-1] if row in rows] == order
    assert len(steps) == 2 + 7  # images share steps where their orders agree
