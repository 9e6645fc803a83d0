"""Probabilities, radii and `none` of a calibration against slow computations."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.area import Area
from s4g_ray.data.sphere import metres_between
from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import FEATURES, FILE, Calibration, NoneModel
from s4g_ray.gallery.ground_mass import GroundMass
from s4g_ray.gallery.search.appearance import Appearance

USUAL = NoneModel((0.0,) * 5, (0.0,) * 5, (1.0,) * 5, bias=-30.0, threshold=0.0)
OFFSETS = tuple(np.sqrt((np.arange(16) + 0.5) / 16) * 0.5)  # uniform in a disc of half a side


def make(**changes: object) -> Calibration:
    calibration = Calibration(
        temperature=0.1,
        rest_logit=0.5,
        none=USUAL,
        offsets=OFFSETS,
        levels=(0.5, 0.9),
        num_candidates=3,
        region=((10.0, 20.0), (10.1, 20.1)),
    )
    return dataclasses.replace(calibration, **changes)  # type: ignore[arg-type]


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


def positions(*values: float) -> np.ndarray:
    return np.array([values], np.float64)


def test_shares_are_a_softmax_with_the_rest_of_the_gallery() -> None:
    shares, rest = make().shares(row(0.9, 0.8, 0.6))
    weights = np.exp(np.array([0.9, 0.8, 0.6]) / 0.1)
    beyond = np.exp(0.6 / 0.1 + 0.5)
    np.testing.assert_allclose(shares[0], weights / (weights.sum() + beyond), rtol=1e-5)
    assert rest[0] == pytest.approx(beyond / (weights.sum() + beyond), rel=1e-5)


def test_a_list_with_missing_candidates_is_the_whole_gallery() -> None:
    shares, rest = make().shares(row(0.9, 0.8, -np.inf))
    assert rest[0] == 0
    assert shares.sum() == pytest.approx(1)
    assert shares[0, 2] == 0


def test_a_list_shorter_than_those_fitted_is_the_whole_gallery() -> None:
    shares, rest = make().shares(row(0.9, 0.8))  # the gallery has shrunk to two tiles
    padded, none = make().shares(row(0.9, 0.8, -np.inf))
    np.testing.assert_array_equal(shares[0], padded[0, :2])
    assert rest[0] == none[0] == 0


def test_candidates_beyond_those_fitted_have_no_share() -> None:
    calibration = make()
    longer, rest = calibration.shares(row(0.9, 0.8, 0.6, 0.59))
    shorter, same = calibration.shares(row(0.9, 0.8, 0.6))
    np.testing.assert_array_equal(longer[0], [*shorter[0], 0.0])
    assert rest[0] == same[0]


def test_probabilities_of_a_judgement_add_up_to_one() -> None:
    model = dataclasses.replace(USUAL, bias=-1.0)
    judged = make(none=model).judge(
        row(0.9, 0.8, 0.6), positions(10, 10, 10), positions(20, 21, 22), positions(50, 50, 50)
    )[0]
    total = judged.probabilities.sum() + judged.rest_probability + judged.none_probability
    assert total == pytest.approx(1)
    assert judged.none_probability == pytest.approx(1 / (1 + np.e))
    assert judged.is_located
    assert judged.reason is None


def test_a_query_above_the_threshold_is_not_located_and_says_why() -> None:
    model = dataclasses.replace(USUAL, bias=2.0)
    judged = make(none=model).judge(
        row(0.9, 0.8, 0.6), positions(10, 10, 10), positions(20, 21, 22), positions(50, 50, 50)
    )[0]
    assert not judged.is_located
    assert (judged.lat, judged.lon, judged.radius_50_m, judged.radius_90_m) == (None,) * 4
    assert judged.reason is not None
    assert "88%" in judged.reason


def test_no_candidate_is_no_answer() -> None:
    nothing = positions(np.nan, np.nan)
    judged = make().judge(row(-np.inf, -np.inf), nothing, nothing, nothing)[0]
    assert not judged.is_located
    assert judged.none_probability == 1
    assert judged.probabilities.tolist() == [0, 0]
    assert judged.reason == "the gallery has no tile there"


def test_candidates_without_coordinates_are_located_without_a_position() -> None:
    nothing = positions(np.nan, np.nan, np.nan)
    judged = make().judge(row(0.9, 0.8, 0.6), nothing, nothing, nothing)[0]
    assert judged.is_located
    assert judged.lat is None
    assert judged.radius_90_m is None


def test_the_rest_lies_where_the_search_looked() -> None:
    columns = (positions(10, 10, 10), positions(20, 20.001, 20.002), positions(50, 50, 50))
    scores = row(0.9, 0.89, 0.88)
    near, far = (10.01, 20.0), (12.0, 22.0)
    calibration = make(region=(near, far, far), rest_logit=2.0)
    area = Area.circle(10, 20, 2000)
    asked, free = (calibration.judge(scores, *columns, None, [a])[0] for a in (area, None))
    only = make(region=(near,), rest_logit=2.0).judge(scores, *columns)[0]
    assert (asked.radius_50_m, asked.radius_90_m) == (only.radius_50_m, only.radius_90_m)
    assert asked.radius_90_m is not None
    assert free.radius_90_m is not None
    assert asked.radius_90_m < 2000 < 100_000 < free.radius_90_m
    elsewhere = Area.circle(10, 20, 500)  # no point of the sample: the candidates carry all
    (alone,) = calibration.judge(scores, *columns, None, [elsewhere])
    assert alone.radius_90_m is not None
    assert alone.radius_90_m < 500


def test_typicality_moves_the_probability_only_when_embeddings_are_given() -> None:
    weights = [0.0] * 5
    weights[FEATURES.index("typicality")] = -3.0
    model = dataclasses.replace(USUAL, weights=tuple(weights), bias=0.0)
    calibration = make(none=model, typical_query=(1.0, 0.0))
    columns = (positions(10, 10, 10), positions(20, 21, 22), positions(50, 50, 50))
    scores = row(0.9, 0.8, 0.6)
    usual = calibration.judge(scores, *columns, np.array([[1, 0]], np.float32))[0]
    unusual = calibration.judge(scores, *columns, np.array([[-1, 0]], np.float32))[0]
    unknown = calibration.judge(scores, *columns)[0]
    assert usual.none_probability < 0.1 < unknown.none_probability
    assert unusual.none_probability > 0.9


@pytest.mark.parametrize("lon", [20.0, 180.0])
def test_radii_hold_their_share_of_simulated_truths(lon: float) -> None:
    """Draw truths from the candidates by their shares, as the model has it."""
    rng = np.random.default_rng(4)
    lat = np.array([45.0, 45.0, 45.02])
    lons = np.array([lon, lon + 0.001, lon + 0.03])
    lons = (lons + 180) % 360 - 180
    size = np.full(3, 200.0)
    shares = np.array([0.4, 0.25, 0.15])
    region = np.stack([rng.uniform(44.9, 45.1, 500), lon + rng.uniform(-0.1, 0.1, 500)], axis=1)
    mass = GroundMass.spread(shares, 0.2, lat, lons, size, np.array(OFFSETS), region)
    assert mass is not None
    kind = rng.choice(4, 20_000, p=[0.4, 0.25, 0.15, 0.2])
    reach = np.sqrt(rng.random(len(kind))) * 0.5 * 200
    angle = rng.uniform(0, 2 * np.pi, len(kind))
    inside = np.minimum(kind, 2)
    true_lat = lat[inside] + reach * np.sin(angle) / 111_195
    true_lon = lons[inside] + reach * np.cos(angle) / 111_195 / np.cos(np.radians(45))
    beyond = region[rng.integers(0, 500, len(kind))]
    true_lat = np.where(kind == 3, beyond[:, 0], true_lat)
    true_lon = np.where(kind == 3, beyond[:, 1], true_lon)
    metres = metres_between(mass.lat, mass.lon, true_lat, true_lon)
    for level in (0.3, 0.5, 0.7, 0.9):
        assert (metres <= mass.radius(level)).mean() == pytest.approx(level, abs=0.02)
        assert mass.level_at(mass.radius(level)) == pytest.approx(level, abs=1e-6)


def test_the_point_lies_between_overlapping_candidates_that_agree() -> None:
    lat = np.array([10.0, 10.0, 11.0])
    lon = np.array([20.0, 20.0005, 21.0])  # 55 m apart, of 100 m
    shares = np.array([0.3, 0.3, 0.4])
    mass = GroundMass.spread(
        shares, 0.0, lat, lon, np.full(3, 100.0), np.array(OFFSETS), np.zeros((0, 2))
    )
    assert mass is not None
    assert mass.lon == pytest.approx(20.00025, abs=1e-7)
    assert mass.lat == pytest.approx(10.0, abs=1e-7)


def test_a_saved_calibration_is_read_back_as_it_was(tmp_path: Path) -> None:
    look = Appearance.fit(np.random.default_rng(0).normal(0, 1, (30, 13)))
    calibration = make(
        typical_query=(0.5, 0.5), min_inliers=7, appearance=look, report={"ece": 0.1}
    )
    calibration.save(str(tmp_path))
    assert Calibration.load(str(tmp_path)) == calibration
    assert Calibration.load(str(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not of format"),
        ('{"format": "s4g-calibration", "version": 9}', "version 9"),
        ('{"format": "s4g-calibration", "version": 1}', "cannot be read"),
        ("{", "calibrate` again"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match=message):
        Calibration.load(str(tmp_path))
