from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.errors import InputError


@pytest.mark.parametrize(
    "text", ["full", "0,3000", "-5.5,1e3", "percentile:2,98", "0,1;2,3;-1,2000"]
)
def test_a_stretch_describes_itself_as_it_is_given(text: str) -> None:
    stretch = Stretch.parse(text)
    assert Stretch.parse(stretch.describe()) == stretch


@pytest.mark.parametrize("text", ["", "3", "a,b", "1,2,3", "percentile:1", "x:1,2", "1.2.3,4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is none of"):
        Stretch.parse(text)


@pytest.mark.parametrize("text", ["5,5", "9,1", "percentile:98,2", "percentile:2,101"])
def test_empty_ranges_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"empty|rise"):
        Stretch.parse(text)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64"])
def test_values_become_bytes_linearly(dtype: str) -> None:
    values = np.arange(0, 240).reshape(8, 10, 3).astype(dtype)
    stretch = Stretch((0, 20, 100), (200, 120, 101))
    low = np.array(stretch.low)
    high = np.array(stretch.high)
    expected = np.clip((values - low) / (high - low) * 255, 0, 255)
    assert np.abs(stretch.apply(values) - expected).max() <= 0.5 + 1e-9


def test_the_full_range_is_that_of_the_type() -> None:
    limits = np.array([[[-32768], [0], [32767]]], np.int16)
    assert Stretch().apply(limits).ravel().tolist() == [0, 128, 255]
    same = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert Stretch().apply(same) is same
    with pytest.raises(InputError, match="no full range"):
        Stretch().apply(np.zeros((1, 1, 1), np.float32))
    with pytest.raises(InputError, match="choose_stretch"):
        Stretch(percentiles=(2, 98)).apply(same)
    with pytest.raises(InputError, match="for 3 bands, the imagery has 1"):
        Stretch((0, 0, 0), (1, 1, 1)).apply(same[..., :1])


def test_nan_becomes_black() -> None:
    assert Stretch((0,), (1,)).apply(np.full((1, 1, 1), np.nan)).item() == 0
