"""Squares of ground of a batch, and what they have in common."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from s4g_ray.data.batches.common_ground import (
    find_gallery_ground,
    find_pair_ground,
    share_common_ground,
)
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.sphere import METRES_A_DEGREE
from s4g_ray.data.tables.text_column import TextColumn

Square = tuple[float, float, float]


def count_common(first: Square, second: Square, cells: int = 400) -> float:
    """Count the cells of a fine grid on the ground that both squares cover, over those of either.

    Longitudes differ by little here; the grid is in metres around the first square.
    """
    lat, lon, side = first
    north = (second[0] - lat) * METRES_A_DEGREE
    turned = (second[1] - lon + 540) % 360 - 180
    east = turned * METRES_A_DEGREE * math.cos(math.radians((lat + second[0]) / 2))
    reach = side + second[2]
    centres = (np.arange(cells) + 0.5) / cells * 2 * reach - reach
    y, x = np.meshgrid(centres, centres, indexing="ij")
    in_first = (abs(x) < side / 2) & (abs(y) < side / 2)
    in_second = (abs(x - east) < second[2] / 2) & (abs(y - north) < second[2] / 2)
    return float((in_first & in_second).sum() / (in_first | in_second).sum())


def share(first: Square, second: Square) -> float:
    a, b = (torch.tensor(square, dtype=torch.float64) for square in (first, second))
    return float(share_common_ground(a, b))


def test_the_share_is_what_a_grid_on_the_ground_counts() -> None:
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(60):
        lat = rng.uniform(-70, 70)
        lon = rng.uniform(-180, 180)
        side, other_side = rng.uniform(40, 120, 2)
        north, east = rng.uniform(-80, 80, 2) / METRES_A_DEGREE
        there = (lat + north, lon + east / math.cos(math.radians(lat)), other_side)
        shares.append(share((lat, lon, side), there))
        assert shares[-1] == pytest.approx(count_common((lat, lon, side), there), abs=0.02)
    assert min(shares) < 0.01
    assert max(shares) > 0.3


def test_squares_half_a_side_apart_share_a_third_and_a_seventh() -> None:
    half = 30 / METRES_A_DEGREE
    here = (0.0, 10.0, 60.0)
    assert share(here, here) == 1
    assert share(here, (half, 10.0, 60.0)) == pytest.approx(1 / 3, rel=1e-6)
    assert share(here, (half, 10 + half, 60.0)) == pytest.approx(1 / 7, rel=1e-6)
    assert share(here, (2 * half, 10.0, 60.0)) == pytest.approx(0, abs=1e-9)
    assert share(here, (-3 * half, 10.0, 60.0)) == 0
    assert share(here, (0.0, 10.0, 120.0)) == pytest.approx(1 / 4)
    assert share((0.0, 180.0, 60.0), (0.0, -180 + half, 60.0)) == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize("unknown", range(3))
def test_an_unknown_square_has_nothing_in_common(unknown: int) -> None:
    square = [5.0, 6.0, 60.0]
    square[unknown] = math.nan
    assert share((5.0, 6.0, 60.0), (square[0], square[1], square[2])) == 0


def table(ids: list[int], lat: list[float], lon: list[float], sizes: list[float]) -> ImageTable:
    count = len(ids)
    return ImageTable(
        ids=np.array(ids),
        place_ids=np.array(ids),
        uris=TextColumn.from_texts([""] * count),
        offsets=np.full(count, -1),
        lengths=np.full(count, -1),
        lat=np.array(lat),
        lon=np.array(lon),
        headings=np.full(count, np.nan, dtype=np.float32),
        sizes=np.array(sizes, dtype=np.float32),
        regions=TextColumn.from_texts([""] * count),
    )


def test_a_query_without_a_position_lies_in_the_middle_of_its_tile() -> None:
    nan = math.nan
    queries = table([7, 9], [1.0, nan], [2.0, nan], [nan, nan])
    references = table([3, 4, 5], [1.5, 11.0, 21.0], [2.5, 12.0, 22.0], [60.0, 80.0, nan])
    found = find_pair_ground(queries, references, np.array([9, -1, 7]), np.array([4, -1, 3]))
    wanted = [[11, 12, 80, 11, 12, 80], [nan] * 6, [1, 2, 60, 1.5, 2.5, 60]]
    np.testing.assert_array_equal(found, wanted)
    gallery = find_gallery_ground(references, np.array([-1, 5, 4]))
    np.testing.assert_array_equal(gallery, [[nan] * 3, [21, 22, nan], [11, 12, 80]])
    with pytest.raises(KeyError):
        find_gallery_ground(replace(references, ids=np.array([3, 4, 6])), np.array([5]))
