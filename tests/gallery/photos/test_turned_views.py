"""Photos turn by the azimuth of their upper edge, or of their centre column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.data.images import turn_panorama
from s4g_ray.gallery.photos.encoder_input import fit_photo, take_as_is
from s4g_ray.gallery.photos.turned_views import find_view_kind, list_turns, turn_photo
from tests.support.tiny_gallery import make_ground


def test_turns_are_even() -> None:
    assert list_turns(1) == [0]
    assert list_turns(4) == [0, 90, 180, 270]
    assert list_turns(3) == [0, 120, 240]


def test_a_quarter_turn_brings_the_right_edge_down() -> None:
    photo = np.zeros((2, 3, 3), np.uint8)
    photo[0, 2] = 200  # the upper right corner
    turned = turn_photo(photo, 90, "overhead")
    assert turned.shape == (3, 2, 3)
    assert turned[2, 1].tolist() == [200, 200, 200]
    for degrees in (0, 90, 180, 270, 360):
        back = turn_photo(turn_photo(photo, degrees, "overhead"), -degrees, "overhead")
        np.testing.assert_array_equal(back, photo)


@pytest.mark.parametrize("degrees", [30.0, 45.0, 200.0])
def test_other_angles_turn_clockwise_about_the_centre(degrees: float) -> None:
    ground = make_ground()
    height, width = ground.shape[:2]
    side = 24
    top, left = (height - side) // 2, (width - side) // 2
    around = ground[top - 20 : top + side + 20, left - 20 : left + side + 20]
    whole = np.asarray(Image.fromarray(around).rotate(-degrees, Image.Resampling.BILINEAR))
    expected = whole[20:-20, 20:-20]
    turned = turn_photo(around[20:-20, 20:-20], degrees, "overhead")
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    is_seen = np.hypot(x, y) < side / 2 - 2  # the corners are made up
    assert np.abs(turned.astype(int) - expected)[is_seen].max() <= 1


def test_panoramas_roll_as_those_of_data_sets() -> None:
    panorama = make_ground()
    for degrees in (0.0, 90.0, 123.0, 359.0):
        tensor = torch.from_numpy(panorama.copy()).permute(2, 0, 1)
        expected = turn_panorama(tensor, degrees).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(turn_photo(panorama, degrees, "panorama"), expected)


def test_a_photo_is_shown_in_the_widest_view_of_a_range() -> None:
    data = DataConfig(uri="-", query_size=(8, 64), query_heading="known", query_fov_deg=(90, 180))
    pixels = np.full((8, 64, 3), 7, np.uint8)
    for _ in range(2):
        fitted = fit_photo(pixels, take_as_is(data))
        assert fitted.shape == (8, 64, 3)
        assert fitted[0, :, 0].nonzero()[0].tolist() == list(range(16, 48))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "overhead"),
        ({"query_size": (140, 768)}, "panorama"),
        ({"query_size": (384, 768)}, "panorama"),
        ({"query_size": (384, 512)}, "overhead"),
        ({"query_heading": "random"}, "panorama"),
        ({"query_fov_deg": 90.0}, "panorama"),
        ({"query_fov_deg": (70.0, 360.0)}, "panorama"),
    ],
)
def test_the_kind_of_view_follows_from_the_preprocessing(
    settings: dict[str, Any], kind: str
) -> None:
    assert find_view_kind(DataConfig(uri="-", **settings)) == kind
