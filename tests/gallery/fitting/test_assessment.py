from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.gallery.fitting.assessment import expected_calibration_error, reliability_bins


def test_the_points_of_a_reliability_diagram_are_means_of_like_weight_over_sorted_queries() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.permutation(np.linspace(0.01, 0.99, 400))
    is_right = rng.random(400) < confidence**2
    weights = np.full(400, 1 / 400)
    points = reliability_bins(confidence, is_right, weights)
    order = np.argsort(confidence)
    for point, rows in zip(points, np.split(order, 10), strict=True):
        assert point["queries"] == 40
        assert point["confidence"] == pytest.approx(confidence[rows].mean())
        assert point["accuracy"] == pytest.approx(is_right[rows].mean())
    gaps = [abs(point["confidence"] - point["accuracy"]) for point in points]
    assert np.mean(gaps) == pytest.approx(expected_calibration_error(confidence, is_right, weights))


def test_queries_count_by_their_weight_in_the_means_of_a_bin() -> None:
    confidence = np.full(4, 0.5)
    is_right = np.array([True, True, True, False])
    (point,) = reliability_bins(confidence, is_right, np.array([0.1, 0.1, 0.1, 0.7]))
    assert point == {"confidence": 0.5, "accuracy": pytest.approx(0.3), "queries": 4}
