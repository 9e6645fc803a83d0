"""The published form of augmentation against plain restatements, by the loader and in batches."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as torchvision
from numpy.typing import NDArray
from torch import Tensor

from s4g_ray.config.data_schema import AugmentConfig, Size
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.batches.augmentation import augment_pair, filter_pixels
from s4g_ray.data.batches.augmentation_draws import (
    COLORS,
    BatchDraws,
    ImageDraws,
    draw_pair,
    draw_reference,
)
from s4g_ray.data.batches.device_augmentation import augment_batch
from tests.support.sample_images import augment_config, make_photo

CVUSA: tuple[Size, Size] = ((140, 768), (384, 384))  # of queries and references
VIGOR: tuple[Size, Size] = ((384, 768), (384, 384))
UNIVERSITY: tuple[Size, Size] = ((384, 384), (384, 384))
SMALL: tuple[Size, Size] = ((36, 90), (40, 40))

ADJUST: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": torchvision.adjust_brightness,
    "contrast": torchvision.adjust_contrast,
    "saturation": torchvision.adjust_saturation,
    "hue": torchvision.adjust_hue,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def published(**values: object) -> AugmentConfig:
    """Make an augmentation in the published form that does nothing but the given values."""
    return augment_config(published=True, **values)


def generator(number: int) -> np.random.Generator:
    return np.random.default_rng((7, number))


def draw(cfg: AugmentConfig, number: int, sizes: tuple[Size, Size]) -> list[ImageDraws]:
    """Draw a query's and a reference's augmentation."""
    return list(draw_pair(cfg, generator(number), *sizes))


def augment_both_ways(
    cfg: AugmentConfig, number: int, images: tuple[Tensor, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Augment a pair by the loader and as batches: ((loader, batch) of queries, of references)."""
    sizes = tuple(tuple(image.shape[-2:]) for image in images)
    by_loader = augment_pair(*images, cfg, generator(number))
    found = []
    for image, draws, wanted in zip(images, draw(cfg, number, sizes), by_loader, strict=True):  # type: ignore[arg-type]
        packed = BatchDraws.from_images([draws], image.shape[-1])
        found.append((wanted, augment_batch(image[None], packed)[0]))
    return found


def white_pair(sizes: tuple[Size, Size]) -> tuple[Tensor, Tensor]:
    query, reference = (torch.full((3, *size), 255, dtype=torch.uint8) for size in sizes)
    return query, reference


def black_out(size: Size, holes: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """Mark the pixels of holes (top, left, height, width), pixel by pixel."""
    masked = np.zeros(size, dtype=bool)
    for top, left, height, width in holes:
        for row in range(top, min(top + height, size[0])):
            for column in range(left, min(left + width, size[1])):
                masked[row, column] = True
    return masked


def grid_holes(size: Size, ratio: float) -> list[tuple[int, int, int, int]]:
    """List the holes of a grid of cells of a tenth of the width, the first one in the corner."""
    cell = size[1] // 10
    side = int(ratio * cell)
    return [
        (top, left, side, side)
        for top in range(0, size[0], cell)
        for left in range(0, size[1], cell)
    ]


@pytest.mark.parametrize(
    ("sizes", "rotate", "cells", "shares"),
    [
        (CVUSA, "panorama", (76, 38), (0.27, 0.16)),
        (VIGOR, "none", (76, 38), (0.26, 0.16)),
        (UNIVERSITY, "reference", (38, 38), (0.16, 0.16)),
    ],
)
def test_a_grid_masks_the_published_share_in_cells_of_a_tenth_of_the_width(
    sizes: tuple[Size, Size], rotate: str, cells: tuple[int, int], shares: tuple[float, float]
) -> None:
    """Ground images lose half of a cell's side, overhead ones 0.4 of it."""
    cfg = published(dropout_probability=1.0, rotate=rotate)
    seen = [0, 0]
    for number in range(8):
        views = augment_both_ways(cfg, number, white_pair(sizes))
        for view, draws in enumerate(draw(cfg, number, sizes)):
            if "grid" not in draws:
                continue
            seen[view] += 1
            is_ground = view == 0 and rotate != "reference"
            masked = black_out(sizes[view], grid_holes(sizes[view], 0.5 if is_ground else 0.4))
            assert draws["grid"][0] == cells[view]
            assert masked.mean() == pytest.approx(shares[view], abs=0.005)
            for image in views[view]:
                assert np.array_equal((image == 0).all(0).numpy(), masked)
    assert min(seen) > 0


@pytest.mark.parametrize(("size", "sides"), [(CVUSA[0], (14, 28)), (CVUSA[1], (38, 76))])
def test_holes_have_heights_and_widths_of_their_own(size: Size, sides: tuple[int, int]) -> None:
    """10 to 25 of them, each side 10 to 20 % of the height, at any place in the image."""
    cfg = published(dropout_probability=1.0)
    holes = []
    counts = []
    for number in range(300):
        draws = draw_reference(cfg, generator(number), size)
        if "holes" in draws:
            its_holes = np.array(draws["holes"], dtype=int).reshape(-1, 4)
            counts.append(len(its_holes))
            holes.append(its_holes)
    assert set(counts) == set(range(10, 26))
    top, left, height, width = np.concatenate(holes).T
    for sizes in (height, width):
        values, number_of_each = np.unique(sizes, return_counts=True)
        assert values.tolist() == list(range(sides[0], sides[1] + 1))
        expected = len(sizes) / len(values)
        assert np.abs(number_of_each - expected).max() < 5 * expected**0.5
    assert abs(np.corrcoef(height, width)[0, 1]) < 5 / len(height) ** 0.5
    for start, sizes, length in ((top, height, size[0]), (left, width, size[1])):
        share = start / (length - sizes)
        assert share.min() >= 0
        assert share.max() <= 1
        assert share.mean() == pytest.approx(0.5, abs=0.04)


def test_holes_are_blacked_out() -> None:
    cfg = published(dropout_probability=1.0)
    sizes = ((60, 130), (50, 50))
    seen = 0
    for number in range(6):
        views = augment_both_ways(cfg, number, white_pair(sizes))
        for view, draws in enumerate(draw(cfg, number, sizes)):
            if "holes" not in draws:
                continue
            seen += 1
            holes = np.array(draws["holes"], dtype=int).reshape(-1, 4).tolist()
            masked = black_out(sizes[view], holes)
            for image in views[view]:
                assert np.array_equal((image == 0).all(0).numpy(), masked)
    assert seen > 2


def sharpen_loop(image: NDArray[np.uint8], alpha: float, lightness: float) -> list[list[list[int]]]:
    """Mix each inner pixel with (8 + lightness) times itself less its eight neighbors."""
    channels, height, width = image.shape
    pixels = image.astype(float)
    out = []
    for channel in range(channels):
        rows = []
        for y in range(1, height - 1):
            row = []
            for x in range(1, width - 1):
                around = pixels[channel, y - 1 : y + 2, x - 1 : x + 2].sum()
                centre = pixels[channel, y, x]
                edges = (8 + lightness) * centre - (around - centre)
                mixed = (1 - alpha) * centre + alpha * edges
                row.append(round(min(max(mixed, 0), 255)))
            rows.append(row)
        out.append(rows)
    return out


def find_sharpening(weights: Sequence[float]) -> tuple[float, float]:
    """Return alpha and lightness of a sharpening filter of nine weights."""
    alpha = -weights[0]
    return alpha, (weights[4] - (1 - alpha)) / alpha - 8


def test_sharpening_answers_an_edge_as_published() -> None:
    """An edge 100 -> 120 becomes 88/132 (alpha 0.2) to 70/150 (0.5) at a lightness of 1."""
    edge = torch.full((3, 5, 6), 100, dtype=torch.uint8)
    edge[..., 3:] = 120
    for alpha, wanted in ((0.2, [100, 88, 132, 120]), (0.5, [100, 70, 150, 120])):
        weights = [-alpha] * 9
        weights[4] = 1 - alpha + alpha * 9
        found = filter_pixels(edge, weights)[0, 2, 1:5].tolist()
        assert found == wanted
        assert sharpen_loop(edge.numpy(), alpha, 1)[0][1] == wanted


def test_sharpening_has_alphas_and_lightnesses_of_the_published_ranges() -> None:
    cfg = published(blur_probability=1.0)
    found = []
    for number in range(600):
        weights = draw_reference(cfg, generator(number), SMALL[1])["filter"]
        if min(weights) < 0:
            found.append(find_sharpening(weights))
    assert 240 < len(found) < 360  # as often as blur
    for values, low, high in zip(zip(*found, strict=True), (0.2, 0.5), (0.5, 1.0), strict=True):
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * (high - low) * 2)


def filter_loop(image: NDArray[np.uint8], weights: Sequence[float]) -> NDArray[np.float64]:
    """Sum the weighted pixels around each, mirrored at the borders without the border itself."""
    side = int(len(weights) ** 0.5)
    channels, height, width = image.shape
    out = np.zeros(image.shape)
    for channel, y, x in itertools.product(range(channels), range(height), range(width)):
        for i, weight in enumerate(weights):
            row = abs(y + i // side - side // 2)
            column = abs(x + i % side - side // 2)
            row = min(row, 2 * (height - 1) - row)
            column = min(column, 2 * (width - 1) - column)
            out[channel, y, x] += weight * image[channel, row, column]
    return out


def test_blur_and_sharpening_equal_sums_over_pixels() -> None:
    cfg = published(blur_probability=1.0)
    images = (make_photo(1, (9, 12)), make_photo(2, (10, 10)))
    kinds = set()
    for number in range(8):
        views = augment_both_ways(cfg, number, images)
        for image, draws, both in zip(
            images, draw(cfg, number, ((9, 12), (10, 10))), views, strict=True
        ):
            weights = draws["filter"]
            kinds.add((len(weights), min(weights) < 0))
            wanted = filter_loop(image.numpy(), weights).clip(0, 255)
            for found in both:
                assert np.abs(found.numpy() - wanted).max() <= 0.5 + 1e-3
            if min(weights) < 0:
                inner = both[0][:, 1:-1, 1:-1].int().numpy()
                by_loops = np.array(sharpen_loop(image.numpy(), *find_sharpening(weights)))
                assert np.abs(inner - by_loops).max() <= 1
    assert kinds == {(9, True), (9, False), (25, False), (49, False)}


def blur_loop(
    side: int, deviations: Sequence[float], angle: float, shape: float, noise: NDArray[Any]
) -> NDArray[np.float64]:
    """Compute a generalised Gaussian from its covariance matrix, pixel by pixel."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    covariance = turn @ np.diag(np.square(deviations)) @ turn.T
    weights = np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            at = np.array([column - side // 2, row - side // 2])
            power = (at @ np.linalg.inv(covariance) @ at) ** shape
            weights[row, column] = np.exp(-0.5 * power) * noise[row, column]
    unit: NDArray[np.float64] = weights / weights.sum()
    return unit


def test_blur_is_a_generalised_gaussian_with_noise() -> None:
    """Drawn here value by value, in the order that a resumed run relies on."""
    cfg = published(blur_probability=1.0)
    shapes = []
    for number in range(60):
        rng = generator(number)
        rng.random(4)  # flip, JPEG, colours, whether to blur or sharpen
        if rng.random() >= 0.5:
            continue
        side = int(rng.choice((3, 5, 7)))
        deviations = rng.uniform(0.2, 1.0, 2).tolist()
        angle = rng.uniform(-np.pi / 2, np.pi / 2)
        shape = rng.uniform(0.5, 1) if rng.random() < 0.5 else rng.uniform(1, 8)
        wanted = blur_loop(side, deviations, angle, shape, rng.uniform(0.9, 1.1, (side, side)))
        found = draw_reference(cfg, generator(number), SMALL[1])["filter"]
        assert np.array(found).reshape(side, side) == pytest.approx(wanted, abs=1e-9)
        shapes.append(shape)
    assert min(shapes) < 1 < max(shapes)


def test_the_four_colours_change_in_each_order_as_often() -> None:
    cfg = published(color_probability=1.0)
    counts: Counter[tuple[str, ...]] = Counter()
    for number in range(2400):
        draws = draw_reference(cfg, generator(number), SMALL[1])
        counts[tuple(name for name in draws if name in COLORS)] += 1
    assert set(counts) == set(itertools.permutations(COLORS))
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 60  # chi-square, 23 degrees


def test_colours_are_drawn_evenly_within_the_published_strength() -> None:
    cfg = published(color_probability=1.0)
    drawn = [draw_reference(cfg, generator(number), SMALL[1]) for number in range(1000)]
    for name in COLORS:
        middle = 0.0 if name == "hue" else 1.0
        changes = np.array([draws[name][0] for draws in drawn]) - middle
        assert np.abs(changes).max() == pytest.approx(0.15, abs=0.002)
        counts, _ = np.histogram(changes, bins=10, range=(-0.15, 0.15))
        assert ((counts - 100) ** 2 / 100).sum() < 28  # chi-square, 9 degrees


def test_operations_follow_each_other_as_published() -> None:
    """Colours, then blur or sharpening, then holes, then the turn: each other order is far off."""
    cfg = published(
        color_probability=1.0,
        blur_probability=1.0,
        dropout_probability=1.0,
        rotate="panorama",
        rotate_probability=1.0,
    )
    images = (make_photo(3, SMALL[0]), make_photo(4, SMALL[1]))
    steps = ("colours", "filter", "holes", "turn")
    apart: dict[tuple[str, ...], list[float]] = {
        order: [] for order in itertools.permutations(steps)
    }
    for number in range(12):
        views = augment_both_ways(cfg, number, images)
        for view, draws in enumerate(draw(cfg, number, SMALL)):
            for order, differences in apart.items():
                wanted = images[view]
                for step in order:
                    wanted = apply_step(wanted, step, draws, 0.4 if view else 0.5)
                differences.extend(
                    float((found.float() - wanted.float()).abs().mean()) for found in views[view]
                )
    means = {order: np.mean(differences) for order, differences in apart.items()}
    assert max(apart[steps]) < 2  # rounded after each colour, then filtered
    assert min(mean for order, mean in means.items() if order != steps) > 2 * means[steps]


def apply_step(image: Tensor, step: str, draws: ImageDraws, ratio: float) -> Tensor:
    """Apply one of the published operations as drawn; ratio: of a grid's holes to its cells."""
    if step == "colours":
        for name, value in draws.items():
            if name in COLORS:
                image = ADJUST[name](image, value[0])
        return image
    if step == "filter":
        return filter_pixels(image, draws["filter"])
    if step == "holes":
        size = (image.shape[-2], image.shape[-1])
        drawn = np.array(draws.get("holes", []), dtype=int).reshape(-1, 4).tolist()
        masked = torch.from_numpy(black_out(size, drawn or grid_holes(size, ratio)))
        return image.masked_fill(masked, 0)
    if "roll" in draws:
        return image.roll(int(draws["roll"][0]), -1)
    turns = [number for number in (1, 2, 3) if f"turn_{90 * number}" in draws]
    return torch.rot90(image, sum(turns), (-2, -1))


def test_the_strict_form_changes_colours_in_one_order() -> None:
    cfg = augment_config(color_probability=1.0)
    for number in range(50):
        draws = draw_reference(cfg, generator(number), SMALL[1])
        assert tuple(name for name in draws if name in COLORS) == COLORS


def test_colours_change_as_in_torchvision_in_the_drawn_order() -> None:
    cfg = published(color_probability=1.0)
    images = (make_photo(3, SMALL[0]), make_photo(4, SMALL[1]))
    apart = 0.0
    for number in range(12):
        views = augment_both_ways(cfg, number, images)
        for image, draws, both in zip(images, draw(cfg, number, SMALL), views, strict=True):
            wanted = image
            for name, (value,) in draws.items():
                wanted = ADJUST[name](wanted, value)
            in_fixed_order = image
            for name in COLORS:
                in_fixed_order = ADJUST[name](in_fixed_order, draws[name][0])
            for found in both:
                assert (found.int() - wanted.int()).abs().max() <= 2  # rounded after each step
            apart = max(apart, float((wanted.int() - in_fixed_order.int()).abs().max()))
    assert apart > 3


def test_flips_come_first_so_that_a_grid_starts_in_the_corner() -> None:
    cfg = published(dropout_probability=1.0, flip_probability=1.0)
    sizes = ((40, 95), (44, 44))
    images = (make_photo(1, sizes[0]).clamp(1), make_photo(2, sizes[1]).clamp(1))
    seen = 0
    for number in range(10):
        views = augment_both_ways(cfg, number, images)
        for view, draws in enumerate(draw(cfg, number, sizes)):
            assert "flip" not in draws
            if "grid" not in draws:
                continue
            seen += 1
            wanted = images[view].flip(-1).clone()
            masked = black_out(sizes[view], grid_holes(sizes[view], 0.4 if view else 0.5))
            wanted[:, torch.from_numpy(masked)] = 0
            for found in views[view]:
                assert torch.equal(found, wanted)
    assert seen > 3


def test_flips_and_turns_are_as_frequent_as_published() -> None:
    cfg = published(flip_probability=0.5, rotate="panorama", rotate_probability=0.75)
    counts: Counter[str] = Counter()
    for number in range(1600):
        query, reference = draw(cfg, number, SMALL)
        assert ("flip_first" in query) == ("flip_first" in reference)
        turn = next((name for name in reference if name.startswith("turn")), "as it is")
        assert ("roll" in query) == (turn != "as it is")
        counts[turn] += 1
        counts["flipped"] += "flip_first" in query
    assert abs(counts["flipped"] - 800) < 100
    for name in ("as it is", "turn_90", "turn_180", "turn_270"):
        assert abs(counts[name] - 400) < 90


def test_each_operation_has_its_published_probability() -> None:
    cfg = AugmentConfig(published=True)
    counts: Counter[str] = Counter()
    for number in range(2000):
        counts.update(draw_reference(cfg, generator(number), SMALL[1]).keys())
    wanted = {"jpeg": 0.5, **dict.fromkeys(COLORS, 0.5), "filter": 0.3, "grid": 0.15, "holes": 0.15}
    for name, share in wanted.items():
        assert counts[name] / 2000 == pytest.approx(share, abs=0.06), name
    assert set(counts) == {*wanted, "flip_first"}


def test_all_of_it_is_the_same_by_the_loader_and_in_batches_but_for_rounding() -> None:
    cfg = AugmentConfig(published=True, jpeg_probability=0, rotate="panorama")
    images = (make_photo(5, SMALL[0]), make_photo(6, SMALL[1]))
    for number in range(24):
        for by_loader, in_batch in augment_both_ways(cfg, number, images):
            difference = (by_loader.int() - in_batch.int()).abs()
            assert difference.max() <= 3
            assert (difference > 0).float().mean() < 5e-3


def test_draws_depend_on_the_generator_alone() -> None:
    cfg = AugmentConfig(published=True, rotate="panorama")
    drawn = [draw(cfg, number, SMALL) for number in range(20)]
    assert drawn == [draw(cfg, number, SMALL) for number in range(20)] != drawn[::-1]


def test_protocol_paper_takes_the_published_form_unless_told_otherwise() -> None:
    def is_published(protocol: str, value: bool | None) -> bool | None:
        section = {} if value is None else {"published": value}
        return RunConfig.model_validate(
            {"run_dir": "r", "protocol": protocol, "data": {"uri": "d"}, "augment": section}
        ).augmentation.published

    assert [is_published("paper", None), is_published("strict", None)] == [True, False]
    assert [is_published("paper", False), is_published("strict", True)] == [False, True]
