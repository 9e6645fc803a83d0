"""A fitted calibration on queries whose probabilities are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import FEATURES, Calibration
from s4g_ray.gallery.fitting.assessment import assess, expected_calibration_error
from s4g_ray.gallery.fitting.calibration_fit import fit
from s4g_ray.gallery.fitting.held_out import HeldOut, halves
from tests.support.held_out_queries import SIZE_M, make_queries, sample_ground


def fit_on(inside: HeldOut, outside: HeldOut) -> Calibration:
    return fit(
        inside,
        outside,
        num_candidates=inside.scores.shape[1],
        region=sample_ground(),
        default_size_m=SIZE_M,
    )


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    outside = make_queries(400, lift=-0.4, is_inside=False, seed=3)
    return fit_on(make_queries(800, seed=1), outside)


def test_the_temperature_that_drew_the_right_candidates_is_found(calibration: Calibration) -> None:
    assert calibration.temperature == pytest.approx(0.05, rel=0.15)


def test_probabilities_and_radii_hold_on_other_queries(calibration: Calibration) -> None:
    outside = make_queries(400, lift=-0.4, is_inside=False, seed=4)
    found = assess(calibration, make_queries(800, seed=2), outside)
    assert found.ece < 0.07  # 0.04 by chance, of 10 bins of 90 queries
    assert found.coverage_50 == pytest.approx(0.5, abs=0.05)
    assert found.coverage_90 == pytest.approx(0.9, abs=0.05)
    assert found.none_outside > 0.95
    assert found.none_inside < 0.1


def test_too_confident_probabilities_have_a_larger_error(calibration: Calibration) -> None:
    inside = make_queries(800, seed=2)
    outside = make_queries(400, lift=-0.4, is_inside=False, seed=4)
    good = assess(calibration, inside, outside)
    sharp = assess(dataclasses.replace(calibration, temperature=0.01), inside, outside)
    assert sharp.ece > 3 * good.ece
    assert sharp.brier > good.brier


def test_queries_that_only_look_unusual_are_told_from_others() -> None:
    inside = make_queries(400, seed=1)
    outside = make_queries(400, unusual=8.0, is_inside=False, seed=3)
    calibration = fit_on(inside, outside)
    found = assess(
        calibration,
        make_queries(400, seed=5),
        make_queries(400, unusual=8.0, is_inside=False, seed=6),
    )
    assert found.none_outside > 0.9
    assert found.none_inside < 0.1


@pytest.mark.parametrize("is_inside_single", [True, False])
def test_looks_of_a_single_place_are_not_relied_on(is_inside_single: bool) -> None:
    inside = make_queries(200, seed=1)
    outside = make_queries(200, unusual=8.0, is_inside=False, seed=3)
    single = np.zeros(200, np.int64)
    if is_inside_single:
        inside = dataclasses.replace(inside, places=single)
    else:
        outside = dataclasses.replace(outside, places=single)
    calibration = fit_on(inside, outside)
    assert not np.any(calibration.typical_query)
    weight = calibration.none.weights[FEATURES.index("typicality")]
    assert weight == pytest.approx(0, abs=1e-6)
    found = assess(calibration, make_queries(200, seed=5), outside)
    assert found.none_inside < 0.2


def test_alike_queries_are_located_all_the_same() -> None:
    """Where nothing tells queries from outside, no more from inside than allowed are refused."""
    calibration = fit_on(make_queries(400, seed=1), make_queries(400, seed=3))
    found = assess(calibration, make_queries(400, seed=5), make_queries(400, seed=6))
    assert found.none_inside < 0.14
    assert found.none_outside < 0.2


def test_radii_hold_their_shares_of_other_queries_when_few_are_fitted_on() -> None:
    others = make_queries(300, seed=99)
    outside = make_queries(40, lift=-0.4, is_inside=False, seed=3)
    found = [
        assess(fit_on(make_queries(40, seed=seed), outside), others, outside)
        for seed in range(100, 112)
    ]
    assert np.mean([one.coverage_50 for one in found]) == pytest.approx(0.5, abs=0.06)
    assert np.mean([one.coverage_90 for one in found]) == pytest.approx(0.9, abs=0.04)


def test_scores_that_say_nothing_leave_the_temperature_near_their_spread() -> None:
    outside = make_queries(40, lift=-0.4, is_inside=False, seed=3)
    for seed in range(4):
        found = fit_on(make_queries(40, temperature=1e3, seed=seed), outside)
        assert 0.01 < found.temperature < 100


def test_intervals_hold_and_queries_without_an_answer_are_counted(
    calibration: Calibration,
) -> None:
    outside = make_queries(100, lift=-0.4, is_inside=False, seed=4)
    few = assess(calibration, make_queries(60, seed=7), outside)
    many = assess(calibration, make_queries(600, seed=8), outside)
    for found in (few, many):
        assert found.num_located == round(found.share_located * found.num_inside)
        assert found.num_covered == found.num_located
        assert found.coverage_50_interval is not None
        assert found.coverage_50_interval[0] < 0.5 < found.coverage_50_interval[1]
        assert found.none_inside_interval[0] <= found.none_inside <= found.none_inside_interval[1]
    assert few.coverage_50_interval is not None
    assert many.coverage_50_interval is not None
    narrow = many.coverage_50_interval[1] - many.coverage_50_interval[0]
    wide = few.coverage_50_interval[1] - few.coverage_50_interval[0]
    assert wide == pytest.approx(np.sqrt(10) * narrow, rel=0.2)
    assert few.brier_error > 2 * many.brier_error > 0
    assert few.ece_error > many.ece_error > 0


def test_without_true_positions_the_radii_keep_their_nominal_levels() -> None:
    inside = make_queries(60, is_inside=False, seed=1)
    by_place = HeldOut(
        **{
            **{name: getattr(inside, name) for name in HeldOut.__dataclass_fields__},
            "true_ids": inside.ids[:, 0],
        }
    )
    assert (by_place.right() == 0).all()
    found = fit_on(by_place, make_queries(60, lift=-0.4, seed=3))
    assert found.levels == (0.5, 0.9)
    measured = assess(found, by_place, make_queries(60, lift=-0.4, seed=4))
    assert measured.coverage_50 is None
    assert measured.recall_at_1 == 1


def test_too_few_queries_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"19 queries from outside .* give at least 40, half of which"
    ):
        fit_on(make_queries(50), make_queries(19))


def test_the_right_candidate_is_the_nearest_that_holds_the_truth() -> None:
    made = make_queries(200, rest_logit=3.0, seed=8)
    right = made.right()
    for row in range(len(made)):
        best, reach = -1, np.inf
        for column in range(made.scores.shape[1]):
            north = (made.true_lat[row] - made.lat[row, column]) * 111_195.08
            east = (made.true_lon[row] - made.lon[row, column]) * 111_195.08
            away = float(np.hypot(north, east))
            if max(abs(north), abs(east)) <= 0.505 * SIZE_M and away < reach:
                best, reach = column, away
        assert right[row] == best


def test_simulated_outside_leaves_out_tiles_near_the_truth() -> None:
    made = make_queries(100, seed=2)
    away = made.without_truth(10)
    assert away.scores.shape == (100, 10)
    assert (away.right()[np.isfinite(away.scores).all(axis=1)] == -1).all()
    assert (np.diff(away.scores, axis=1) <= 0).all()


def test_halves_share_no_place() -> None:
    places = np.repeat(np.arange(30), 4)
    first, second = halves(places, seed=3)
    assert set(places[first]).isdisjoint(places[second])
    assert first.sum() == second.sum() == 60


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy() -> None:
    confidence = np.repeat([0.2, 0.8], 500)
    is_right = np.concatenate([np.arange(500) < 100, np.arange(500) < 300])
    assert expected_calibration_error(confidence, is_right) == pytest.approx(0.1)
    exact = np.concatenate([np.arange(500) < 100, np.arange(500) < 400])
    shuffled = np.random.default_rng(0).permutation(1000)
    assert expected_calibration_error(confidence[shuffled], exact[shuffled]) < 0.06
