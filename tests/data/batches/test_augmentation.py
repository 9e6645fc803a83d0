from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as torchvision
from PIL import Image
from torch import Tensor

from s4g_ray.data.batches.augmentation import (
    augment_pair,
    augment_reference,
    blur,
    change_colors,
    coarse_dropout,
    grid_dropout,
    recompress,
    rotate_pair,
    sharpen,
)
from s4g_ray.data.batches.augmentation_draws import COLORS
from s4g_ray.data.images import resize, turn_panorama
from tests.support.sample_images import augment_config, make_image


@pytest.mark.parametrize("setting", ["jpeg", "color", "blur", "dropout"])
def test_each_probability_of_a_pair_switches_its_own_operation(setting: str) -> None:
    """A library that ignored an argument would not change the image, or change it when off."""
    query = make_image(1)
    reference = make_image(2)
    quality = {"jpeg_quality": (30, 40)} if setting == "jpeg" else {}
    on = augment_config(**{f"{setting}_probability": 1.0}, **quality)
    off = augment_config()
    rng = np.random.default_rng(4)
    changed = augment_pair(query, reference, on, rng)
    assert not torch.equal(changed[0], query)
    assert not torch.equal(changed[1], reference)
    same = augment_pair(query, reference, off, np.random.default_rng(4))
    assert torch.equal(same[0], query)
    assert torch.equal(same[1], reference)


def test_color_strength_bounds_the_change_and_jpeg_quality_orders_it() -> None:
    image = make_image(3)

    def change(**values: object) -> float:
        rng = np.random.default_rng(9)
        out = [
            augment_pair(image, image, augment_config(**values), rng)[0].float() - image
            for _ in range(20)
        ]
        return float(torch.stack(out).abs().mean())

    weak, strong = (change(color_probability=1.0, color_strength=s) for s in (0.02, 0.3))
    assert weak < strong / 4
    fine, coarse = (change(jpeg_probability=1.0, jpeg_quality=q) for q in ((100, 100), (10, 10)))
    assert fine < coarse / 2


def test_dropout_blacks_out_the_expected_share() -> None:
    white = torch.full((3, 100, 100), 255, dtype=torch.uint8)
    for seed in range(20):
        coarse = (coarse_dropout(white, np.random.default_rng(seed)) == 0).float().mean().item()
        assert 0.05 < coarse < 0.65
        grid = (grid_dropout(white, np.random.default_rng(seed)) == 0).float().mean().item()
        assert grid == pytest.approx(0.4**2, abs=0.08)
    assert (white == 255).all()


def panorama_of(reference: Tensor, width: int) -> Tensor:
    """Render the panorama of a camera in the middle of a north-up tile.

    Column x shows azimuth (x / width - 1/2) * 360.
    """
    side = reference.shape[-1]
    azimuth = (np.arange(width) / width - 0.5) * 2 * np.pi
    radius = np.linspace(0.2, 0.45, 8)[:, None] * side
    rows = np.round((side - 1) / 2 - radius * np.cos(azimuth)).astype(int)
    columns = np.round((side - 1) / 2 + radius * np.sin(azimuth)).astype(int)
    return reference[:, torch.from_numpy(rows), torch.from_numpy(columns)]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_rolled_panorama_is_the_panorama_of_the_turned_tile(turns: int) -> None:
    reference = make_image(5).repeat_interleave(4, 1).repeat_interleave(4, 2)
    query, turned = rotate_pair(panorama_of(reference, 360), reference, turns, "panorama")
    right = (query.float() - panorama_of(turned, 360).float()).abs().mean()
    turned_back = torch.rot90(reference, -turns, (1, 2))
    wrong = (query.float() - panorama_of(turned_back, 360).float()).abs().mean()
    assert right < 3
    assert turns == 2 or wrong > 10 * right


def test_odd_panorama_widths_roll_to_the_nearest_column() -> None:
    panorama = torch.arange(103, dtype=torch.uint8).expand(3, 5, 103)
    query, _ = rotate_pair(panorama, make_image(), 1, "panorama")
    assert query[0, 0, 0] == 26


def test_flip_and_planar_rotation_are_the_same_for_both_views() -> None:
    image = make_image(6)
    for values in ({"flip_probability": 1.0}, {"rotate": "planar", "rotate_probability": 1.0}):
        query, reference = augment_pair(
            image, image, augment_config(**values), np.random.default_rng(3)
        )
        assert torch.equal(query, reference)
        assert not torch.equal(query, image)
    query, reference = augment_pair(
        image,
        image,
        augment_config(rotate="reference", rotate_probability=1.0),
        np.random.default_rng(3),
    )
    assert torch.equal(query, image)
    assert not torch.equal(reference, image)
    with pytest.raises(ValueError, match="square"):
        rotate_pair(image, image[:, :, :20], 1, "reference")


def marked_tile(side: int, azimuth_deg: float) -> Tensor:
    """Make a dark north-up tile with a bright spot at an azimuth from its centre."""
    tile = torch.zeros(3, side, side, dtype=torch.uint8)
    row = (side - 1) / 2 - 0.35 * side * np.cos(np.radians(azimuth_deg))
    column = (side - 1) / 2 + 0.35 * side * np.sin(np.radians(azimuth_deg))
    tile[:, round(row) - 1 : round(row) + 2, round(column) - 1 : round(column) + 2] = 255
    return tile


def marked_panorama(width: int, azimuth_deg: float) -> Tensor:
    """Make a dark panorama, its centre column north, with a bright column at an azimuth."""
    panorama = torch.zeros(3, 6, width, dtype=torch.uint8)
    panorama[:, :, round((azimuth_deg / 360 + 0.5) * width) % width] = 255
    return panorama


def azimuth_in_tile(tile: Tensor) -> float:
    centre = (tile.shape[-1] - 1) / 2
    rows, columns = torch.nonzero(tile[0], as_tuple=True)
    row = rows.float().mean().item() - centre
    column = columns.float().mean().item() - centre
    return float(np.degrees(np.arctan2(column, -row)))


def azimuth_in_panorama(panorama: Tensor) -> float:
    column = torch.nonzero(panorama[0, 0]).float().mean().item()
    return (column / panorama.shape[-1] - 0.5) * 360


@pytest.mark.parametrize("width", [360, 361, 767, 102])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("azimuth", [-120.0, 10.0, 75.0])
def test_a_bearing_marked_in_both_views_stays_matched_when_both_turn(
    width: int, turns: int, azimuth: float
) -> None:
    panorama, tile = rotate_pair(
        marked_panorama(width, azimuth), marked_tile(121, azimuth), turns, "panorama"
    )
    column = 360 / width
    difference = (azimuth_in_panorama(panorama) - azimuth_in_tile(tile) + 180) % 360 - 180
    assert abs(difference) <= column + 1.0  # a column, and the spot's own pixels
    turned = (azimuth_in_tile(tile) - azimuth + 180) % 360 - 180
    assert abs((turned + 90 * turns + 180) % 360 - 180) < 1.0  # counter-clockwise


@pytest.mark.parametrize("azimuth", [-120.0, 10.0, 75.0])
def test_a_bearing_stays_matched_when_both_views_are_flipped(azimuth: float) -> None:
    panorama, tile = augment_pair(
        marked_panorama(361, azimuth),
        marked_tile(121, azimuth),
        augment_config(flip_probability=1.0),
        np.random.default_rng(0),
    )
    assert abs(azimuth_in_tile(tile) + azimuth) < 1.0
    assert abs(azimuth_in_panorama(panorama) - azimuth_in_tile(tile)) <= 2 * 360 / 361 + 1.0


@pytest.mark.parametrize("width", [64, 77])
@pytest.mark.parametrize("heading", [0.0, 90.0, 200.0, -45.0])
def test_a_known_heading_turns_the_panorama_to_the_north(width: int, heading: float) -> None:
    """The panorama's centre has azimuth `heading`; a mark in the north must move to its centre."""
    found = azimuth_in_panorama(turn_panorama(marked_panorama(width, -heading), heading))
    assert abs((found + 180) % 360 - 180) <= 1.5 * 360 / width


def test_a_pair_is_compressed_before_it_is_resized() -> None:
    cfg = augment_config(jpeg_probability=1.0, jpeg_quality=(20, 20))
    big = make_image(1).repeat_interleave(4, 1).repeat_interleave(4, 2)

    def small(image: Tensor) -> Tensor:
        return resize(image, (24, 24))

    query, _ = augment_pair(big, big, cfg, np.random.default_rng(0), (small, small))
    assert torch.equal(query, small(recompress(big, 20)))
    assert not torch.equal(query, recompress(small(big), 20))


def test_only_the_query_turns_where_its_orientation_is_unknown() -> None:
    query, reference = rotate_pair(make_image(1), make_image(2), 3, "query")
    assert torch.equal(query, torch.rot90(make_image(1), 3, (-2, -1)))
    assert torch.equal(reference, make_image(2))
    with pytest.raises(ValueError, match="square"):
        rotate_pair(make_image(1)[:, :, :20], make_image(2), 1, "query")


COLOURS = torch.cartesian_prod(*[torch.arange(0, 256, 15)] * 3).T.reshape(3, 72, 81).to(torch.uint8)


@pytest.mark.parametrize(
    "factors", [(1.1, 0.9, 1.12, 0.1), (0.85, 1.15, 0.85, -0.15), (1.5, 1.5, 0.5, 0.5)]
)
def test_colours_change_as_in_torchvision(factors: tuple[float, float, float, float]) -> None:
    brightness, contrast, saturation, hue = factors
    wanted = torchvision.adjust_contrast(
        torchvision.adjust_brightness(COLOURS, brightness), contrast
    )
    wanted = torchvision.adjust_hue(torchvision.adjust_saturation(wanted, saturation), hue)
    found = change_colors(COLOURS, dict(zip(COLORS, factors, strict=True)))
    assert (found.int() - wanted.int()).abs().max() <= 1
    assert not torch.equal(found, COLOURS)


def test_a_hue_is_turned_by_its_share_of_the_circle() -> None:
    """Compare with colorsys, pixel by pixel."""
    found = change_colors(COLOURS, {"hue": 0.15}).flatten(1).T
    for colour, turned in zip(
        COLOURS.flatten(1).T[::50].tolist(), found[::50].tolist(), strict=True
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
        wanted = colorsys.hsv_to_rgb((hue + 0.15) % 1, saturation, value)
        assert np.abs(np.array(turned) - 255 * np.array(wanted)).max() <= 1


def test_blur_and_sharpening_equal_those_of_torchvision() -> None:
    image = torch.randint(
        0, 256, (3, 40, 61), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for value in (0.3, 0.8, 1.2):
        wanted = torchvision.gaussian_blur(image, [5, 5], [value, value])
        assert (blur(image, value).int() - wanted.int()).abs().max() <= 1
        sharp = sharpen(image, 1 + value)
        assert (sharp.int() - torchvision.adjust_sharpness(image, 1 + value).int()).abs().max() <= 1
        assert not torch.equal(sharp, image)


def test_recompression_loses_as_much_as_pillow_and_leaves_too_large_images() -> None:
    image = resize(make_image(4), (96, 96))
    for quality in (30, 60, 90):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as compressed:
            wanted = torch.from_numpy(np.array(compressed)).permute(2, 0, 1)
        lost, by_pillow = (
            (made.int() - image.int()).abs().float().mean()
            for made in (recompress(image, quality), wanted)
        )
        assert lost == pytest.approx(float(by_pillow), rel=0.1)
    wide = torch.zeros(3, 1, 65_501, dtype=torch.uint8)
    assert recompress(wide, 90) is wide


@pytest.mark.parametrize("how", ["none", "panorama", "planar", "reference", "query"])
def test_a_reference_is_flipped_as_often_as_pairs_and_turned_where_references_are(how: str) -> None:
    image = make_image(1)
    views = {"": image, **{str(k): torch.rot90(image, k, (-2, -1)) for k in (1, 2, 3)}}
    views |= {
        f"{name} flipped": torch.rot90(image.flip(-1), int(name or 0), (-2, -1))
        for name in list(views)
    }
    cfg = augment_config(flip_probability=0.5, rotate=how, rotate_probability=0.75)
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(views, 0)
    for _ in range(1600):
        out = augment_reference(image, cfg, rng)
        counts[next(name for name, view in views.items() if torch.equal(view, out))] += 1
    turned = 0.0 if how in ("none", "query") else 0.75
    for name, count in counts.items():
        expected = 1600 * 0.5 * (turned / 3 if name[:1].isdigit() else 1 - turned)
        assert abs(count - expected) <= 5 * np.sqrt(expected)


@pytest.mark.parametrize("setting", ["color", "blur", "dropout"])
def test_each_probability_of_a_reference_switches_its_own_operation(setting: str) -> None:
    changed = augment_reference(
        make_image(1), augment_config(**{f"{setting}_probability": 1.0}), np.random.default_rng(4)
    )
    assert not torch.equal(changed, make_image(1))


def test_a_reference_is_compressed_before_it_is_resized() -> None:
    big = make_image(1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    cfg = augment_config(jpeg_probability=1.0, jpeg_quality=(20, 20))
    out = augment_reference(
        big, cfg, np.random.default_rng(0), lambda image: resize(image, (24, 24))
    )
    assert torch.equal(out, resize(recompress(big, 20), (24, 24)))
