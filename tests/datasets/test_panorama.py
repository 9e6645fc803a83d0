from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from s4g_ray.data.batches.augmentation import rotate_pair
from s4g_ray.datasets.panorama import unroll

SIDE = 257  # odd, so that the centre is a pixel's
SIZE = (32, 128)
WHOLE = np.array([[[0.0, 0.0], [SIDE, 0.0]], [[0.0, SIDE], [SIDE, SIDE]]])


def make_ground() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The azimuth in degrees and the distance, of half the side, of each pixel of a square."""
    south, east = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    return np.degrees(np.arctan2(east, -south)), np.hypot(east, south) / (SIDE / 2)


def make_noise(seed: int, side: int = SIDE) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


@pytest.mark.parametrize("heading", [0.0, 90.0, 213.7])
@pytest.mark.parametrize("size", [SIZE, (31, 129)])
def test_columns_are_azimuths_and_rows_are_distances_with_the_nearest_at_the_bottom(
    heading: float, size: tuple[int, int]
) -> None:
    azimuth, distance = make_ground()
    angle = np.radians(azimuth)
    channels = [127.5 + 127 * np.sin(angle), 127.5 + 127 * np.cos(angle), 255 * distance]
    picture = np.stack(channels, axis=-1).round().clip(0, 255).astype(np.uint8)
    found = unroll(picture, WHOLE, size, heading).astype(float)
    height, width = size
    assert found.shape == (height, width, 3)
    far = slice(0, height * 3 // 4)  # nearer, a pixel of the picture spans many degrees
    seen = np.degrees(np.arctan2(found[far, :, 0] - 127.5, found[far, :, 1] - 127.5))
    wanted = heading + (np.arange(width) - (width - 1) / 2) * 360 / width
    assert np.abs((seen - wanted + 180) % 360 - 180).max() < 1.5  # a column is 2.8 degrees
    wanted_distance = np.array([height - row - 0.5 for row in range(height)]) / height
    assert np.abs(found[..., 2] / 255 - wanted_distance[:, None]).max() < 0.01  # a row is 0.03


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turning_the_tile_by_quarters_rolls_the_panorama_as_augmentation_does(turns: int) -> None:
    picture = make_noise(turns)
    panorama = unroll(picture, WHOLE, SIZE, 30.0)
    turned = unroll(np.ascontiguousarray(np.rot90(picture, turns)), WHOLE, SIZE, 30.0)
    pair = (torch.from_numpy(panorama).permute(2, 0, 1), torch.from_numpy(picture).permute(2, 0, 1))
    rolled, tile = rotate_pair(*pair, turns, "panorama")
    assert torch.equal(tile, torch.from_numpy(np.rot90(picture, turns).copy()).permute(2, 0, 1))
    difference = np.abs(turned.astype(int) - rolled.permute(1, 2, 0).numpy())
    assert difference.max() <= 1
    assert difference.mean() < 0.001
    assert np.abs(turned.astype(int) - panorama).mean() > 20


def test_a_heading_of_whole_columns_rolls_the_panorama() -> None:
    picture = make_noise(0)
    north = unroll(picture, WHOLE, SIZE, 0.0)
    for columns in (1, 50, 127):
        headed = unroll(picture, WHOLE, SIZE, columns * 360 / SIZE[1])
        assert np.abs(headed.astype(int) - np.roll(north, -columns, axis=1)).max() <= 1


def test_pixels_are_those_of_a_plain_loop_also_beyond_the_picture() -> None:
    """The square is turned, stretched, and reaches over the picture's border."""
    picture = make_noise(3, 40)
    corners = np.array([[[8.0, -4.0], [38.0, 3.0]], [[3.0, 25.0], [33.5, 33.0]]])
    size = (6, 20)
    found = unroll(picture, corners, size, 77.0)
    for row in range(size[0]):
        for column in range(size[1]):
            angle = np.radians(77.0 + (column + 0.5) * 18 - 180)
            away = (5.5 - row) / 6
            right = 0.5 + 0.5 * away * np.sin(angle)
            down = 0.5 - 0.5 * away * np.cos(angle)
            weights = [(1 - right) * (1 - down), right * (1 - down), (1 - right) * down]
            weights.append(right * down)
            x, y = sum(w * p for w, p in zip(weights, corners.reshape(4, 2), strict=True)) - 0.5
            total = np.zeros(3)
            for i in (int(np.floor(y)), int(np.floor(y)) + 1):
                for j in (int(np.floor(x)), int(np.floor(x)) + 1):
                    weight = (1 - abs(y - i)) * (1 - abs(x - j))
                    total += weight * picture[min(max(i, 0), 39), min(max(j, 0), 39)]
            assert np.abs(found[row, column] - total).max() <= 0.5 + 1e-6
