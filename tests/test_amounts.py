"""Amounts read as people write them."""

from __future__ import annotations

import math

import pytest

from s4g_ray.amounts import count_noun, format_bytes, format_duration, join_first


@pytest.mark.parametrize(
    ("count", "nouns", "text"),
    [
        (1, ("query", "queries"), "1 query"),
        (0, ("query", "queries"), "0 queries"),
        (2000, ("shard",), "2,000 shards"),
        (1.0, ("CPU",), "1 CPU"),
        (0.5, ("CPU",), "0.5 CPUs"),
        (0.999999999, ("CPU",), "1 CPU"),
        (math.inf, ("CPU",), "inf CPUs"),
        (math.nan, ("CPU",), "nan CPUs"),
    ],
)
def test_a_count_has_its_noun(count: float, nouns: tuple[str, ...], text: str) -> None:
    assert count_noun(count, *nouns) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999.4, "999 bytes"),
        (12_300, "12.3 kB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (5.67e9, "5.67 GB"),
        (2e15, "2 PB"),
        (-0.3, "0 bytes"),
        (-1, "-1 byte"),
        (-12_300, "-12.3 kB"),
        (math.inf, "inf bytes"),
        (-math.inf, "-inf bytes"),
        (math.nan, "nan bytes"),
    ],
)
def test_bytes_have_three_digits_and_a_decimal_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_durations_have_a_suitable_unit() -> None:
    times = (0.0, 1e-5, 0.0123, 4.56, 45.4, 150, 9000, 400_000)
    formatted = [format_duration(seconds) for seconds in times]
    long = ["4.6 s", "45 s", "2.5 min", "2.5 h", "4.63 d"]
    assert formatted == ["0 s", "below 1 ms", "0.012 s", *long]


def test_the_first_names_are_joined() -> None:
    assert join_first(["a", "b"]) == "a, b"
    assert join_first(list("abc"), 2) == "a, b and 1 more"
