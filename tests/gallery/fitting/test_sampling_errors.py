"""Intervals and standard errors against drawing the queries again and again."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from s4g_ray.gallery.fitting.sampling_errors import (
    resampled_error,
    share_interval,
    standard_error,
    upper_bound,
)


def test_of_independent_queries_the_interval_is_wilsons() -> None:
    hits = np.arange(200) < 180
    expected = binomtest(180, 200).proportion_ci(0.95, method="wilson")
    low, high = share_interval(np.random.default_rng(0).permutation(hits), np.arange(200))
    assert low == pytest.approx(expected.low, abs=2e-3)
    assert high == pytest.approx(expected.high, abs=2e-3)


def test_intervals_hold_the_share_also_where_queries_of_a_place_are_alike() -> None:
    rng = np.random.default_rng(1)
    places = np.repeat(np.arange(60), 3)
    held = 0
    widths = []
    for _ in range(300):
        hits = np.repeat(rng.random(60) < 0.7, 3)
        low, high = share_interval(hits, places)
        held += low <= 0.7 <= high
        widths.append(high - low)
    assert held / 300 > 0.9
    low, high = share_interval(np.arange(180) < 126, np.arange(180))
    assert np.mean(widths) == pytest.approx(np.sqrt(3) * (high - low), rel=0.15)


def test_intervals_of_none_all_and_no_queries() -> None:
    low, high = share_interval(np.zeros(30, bool), np.arange(30))
    assert low == 0
    assert 0.05 < high < 0.2
    assert share_interval(np.ones(30, bool), np.arange(30))[1] == pytest.approx(1)
    assert share_interval(np.zeros(0, bool), np.zeros(0, np.int64)) == (0.0, 1.0)


def test_the_upper_bound_is_exact() -> None:
    assert upper_bound(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300))
    expected = binomtest(4, 90).proportion_ci(0.9, method="exact").high
    assert upper_bound(4, 90) == pytest.approx(expected)
    assert upper_bound(5, 5) == 1


def test_standard_errors_are_those_of_queries_drawn_again() -> None:
    rng = np.random.default_rng(2)
    places = np.repeat(np.arange(100), 4)
    means = []
    errors = []
    drawn = []
    for _ in range(200):
        values = np.repeat(rng.normal(0, 1, 100), 4) + rng.normal(0, 1, 400)
        means.append(values.mean())
        errors.append(standard_error(values, places))
    drawn.append(resampled_error(lambda times: float(np.average(values, weights=times)), places))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    assert drawn[0] == pytest.approx(errors[-1], rel=0.25)
