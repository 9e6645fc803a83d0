"""Refinement on pictures with a known position, on real scenes and on ones without a chance."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest

from s4g_ray.data.sphere import metres_between
from s4g_ray.errors import InputError
from s4g_ray.gallery.refinement import Refined, find_features, refine_position
from tests.support import landsat

SIDE_M = landsat.METRES * landsat.PIXELS


@dataclass(frozen=True)
class Case:
    query: landsat.Query
    lat: float
    lon: float
    tile: landsat.Picture


def cases_of(bands: tuple[int, ...], count: int, seed: int) -> list[Case]:
    places = landsat.find_places(overlap=0.0)
    rng = np.random.default_rng(seed)
    scene = landsat.open_scene("landsat.tif", bands)
    tiles = landsat.open_scene()
    found = []
    for row in rng.choice(len(places), count, replace=False):
        lat, lon = float(places.lat[row]), float(places.lon[row])
        query = landsat.cut_query(scene, lat, lon, rng)
        found.append(Case(query, lat, lon, tiles.cut(lat, lon)))
    return found


def refine(case: Case, min_inliers: int = 6) -> Refined | None:
    return refine_position(
        case.query.picture,
        case.tile,
        lat=case.lat,
        lon=case.lon,
        size_m=SIDE_M,
        min_inliers=min_inliers,
    )


def error_m(case: Case, found: Refined) -> float:
    return float(metres_between(case.query.lat, case.query.lon, found.lat, found.lon))


def test_position_heading_and_scale_hold_within_the_same_bands() -> None:
    cases = cases_of(landsat.TRUE_COLOR, 8, seed=1)
    found = [(case, refine(case)) for case in cases]
    refined = [(case, one) for case, one in found if one is not None]
    assert len(refined) >= 7
    errors = [error_m(case, one) for case, one in refined]
    assert np.median(errors) < 5  # a sixth of a pixel
    for case, one in refined:
        turned = (one.heading_deg - case.query.turn_deg + 180) % 360 - 180
        assert abs(turned) < 3
        assert one.scale == pytest.approx(case.query.scale, rel=0.05)


def test_four_of_five_infrared_queries_come_within_45_m() -> None:
    cases = cases_of(landsat.SWIR, 25, seed=2)
    found = [refine(case) for case in cases]
    errors = [error_m(case, one) for case, one in zip(cases, found, strict=True) if one is not None]
    assert sum(error < 45 for error in errors) >= 0.75 * len(cases)
    assert sum(error >= 45 for error in errors) <= 0.05 * len(errors)


def test_tiles_of_other_places_are_refused() -> None:
    cases = cases_of(landsat.SWIR, 10, seed=3)
    for case, other in zip(cases, cases[1:] + cases[:1], strict=True):
        swapped = Case(case.query, other.lat, other.lon, other.tile)
        assert refine(swapped) is None


@pytest.mark.parametrize("value", [0, 255])
def test_pictures_without_features_change_nothing(value: int) -> None:
    flat = np.full((64, 64, 3), value, np.uint8)
    assert len(find_features(flat).points) == 0
    assert refine_position(flat, flat, lat=0, lon=0, size_m=100, min_inliers=4) is None


def test_features_and_pictures_give_the_same_at_other_sizes() -> None:
    case = cases_of(landsat.TRUE_COLOR, 1, seed=5)[0]
    larger = landsat.open_scene().cut(case.lat, case.lon, metres=7.5, pixels=256)
    whole = refine_position(
        larger, case.tile, lat=case.lat, lon=case.lon, size_m=SIDE_M, min_inliers=5
    )
    parts = refine_position(
        find_features(larger),
        find_features(case.tile),
        lat=case.lat,
        lon=case.lon,
        size_m=SIDE_M,
        min_inliers=5,
    )
    assert whole == parts
    assert whole is not None
    assert float(metres_between(case.lat, case.lon, whole.lat, whole.lon)) < 5
    assert whole.scale == pytest.approx(1.0, rel=0.02)
    assert min(whole.heading_deg, 360 - whole.heading_deg) < 1


def test_a_missing_opencv_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"pip install 's4g-ray\[locate\]'"):
        find_features(np.zeros((8, 8, 3), np.uint8))
