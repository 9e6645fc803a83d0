"""The choice of inliers on refinements whose errors are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s4g_ray.gallery.fitting.held_out import HeldOut
from s4g_ray.gallery.fitting.inlier_choice import (
    FEWEST_ACCEPTED,
    MOST_WRONG,
    choose_min_inliers,
    choose_rule,
    describe_rule,
)
from s4g_ray.gallery.fitting.refinement_trials import RefinementTrials, compared_columns
from s4g_ray.gallery.locate import locate
from s4g_ray.gallery.search.appearance import NUM_VALUES
from s4g_ray.gallery.search.refine import NUM_REFINED
from tests.gallery.test_locate import calibration
from tests.support.tiny_gallery import TinyGallery


def make(
    inliers: list[int], errors: list[float], *, elsewhere: int = 0, look: float = 0.0
) -> RefinementTrials:
    """Trials whose right tile was compared; elsewhere: most inliers with another tile."""
    count = len(inliers)
    looks = np.random.default_rng(count).normal(look, 1, (count, NUM_VALUES))
    return RefinementTrials(
        np.array(inliers),
        np.array(errors, np.float64),
        np.full(count, 1000.0),
        np.ones(count, bool),
        looks,
        np.array([0] * 50 + [elsewhere]),
    )


def test_wrong_positions_push_the_limit_above_their_inliers() -> None:
    found = make([5] * 20 + [6] * 20 + [30] * 80, [500.0] * 40 + [10.0] * 80)
    rule = choose_rule(found)
    assert rule.min_inliers == 7
    told = describe_rule(rule, found)
    assert told["wrong_of_accepted"] == 0
    assert told["accepted"] == pytest.approx(80 / 120, abs=0.03)  # unusual looks are refused


def test_without_wrong_positions_the_least_is_chosen() -> None:
    assert choose_min_inliers(make([40] * 50, [5.0] * 50)) == 5


def test_a_tile_elsewhere_is_never_accepted_again() -> None:
    found = make([40] * 50, [5.0] * 50, elsewhere=11)
    rule = choose_rule(found)
    assert rule.min_inliers == 12
    told = describe_rule(rule, found)
    assert (told["false_of_elsewhere"], told["num_elsewhere"]) == (0, 51)
    assert told["most_false"] == pytest.approx(1 - 0.05 ** (1 / 51))  # none of 51, with 95 %


def test_queries_without_a_chance_choose_nothing() -> None:
    assert choose_min_inliers(make([0] * 100, [np.inf] * 100)) is None
    few = FEWEST_ACCEPTED - 1
    assert choose_min_inliers(make([40] * few, [5.0] * few)) is None
    assert choose_min_inliers(make([8] * 50, [900.0] * 50)) is None


def test_queries_that_are_seldom_placed_are_all_refused() -> None:
    """As thermal ones: an eighth is placed well, and nothing tells which of the others could be."""
    found = make([0] * 140 + [20] * 20, [np.inf] * 140 + [5.0] * 20)
    assert choose_min_inliers(found) == 5
    rule = choose_rule(found)
    assert rule.min_inliers is None
    assert "20 of 160 queries whose tile is right" in rule.report["reason"]
    assert not rule.accepts(found).any()


def test_photos_of_another_look_are_not_accepted() -> None:
    rule = choose_rule(make([40] * 60, [5.0] * 60))
    alike = make([40] * 61, [5.0] * 61)
    other = make([40] * 61, [5.0] * 61, look=4.0)
    assert rule.accepts(alike).mean() > 0.9
    assert not rule.accepts(other).any()
    assert describe_rule(rule, other)["looks_unusual"] == 1


def test_the_share_of_wrong_positions_stays_below_its_limit() -> None:
    rng = np.random.default_rng(3)
    inliers = rng.integers(4, 60, 400)
    wrong = rng.random(400) < np.exp(-(inliers - 4) / 6)
    found = make(inliers.tolist(), np.where(wrong, 800.0, 5.0).tolist())
    chosen = choose_min_inliers(found)
    assert chosen is not None
    assert wrong[inliers >= chosen].mean() < MOST_WRONG
    assert wrong[inliers >= chosen - 3].mean() > MOST_WRONG / 2


@pytest.mark.usefixtures("one_thread")
def test_the_compared_tiles_are_those_that_locating_compares(tmp_path: Path) -> None:
    gallery: Any = TinyGallery(tmp_path)
    found = calibration(threshold=100.0)
    found.save(gallery.uri)
    gallery.has_calibration = True
    photos = gallery.images[3:33:3]
    ids, scores = gallery.search(gallery.encode(photos), gallery.num_tiles)
    rows = gallery.tiles.rows(ids)
    columns = (gallery.tiles.lat[rows], gallery.tiles.lon[rows], gallery.tiles.size_m[rows])
    unknown = np.full(len(photos), -1)
    nowhere = np.full(len(photos), np.nan)
    held = HeldOut(
        *(ids, scores, *columns, np.zeros((len(photos), 1), np.float32)),
        *(nowhere, nowhere, unknown, unknown, unknown),
    )
    compared = compared_columns(held, found)
    told = [ids[i, part].tolist() for i, part in enumerate(compared)]
    answers = locate(gallery, photos)
    assert told == [[c.id for c in answer.candidates[:NUM_REFINED]] for answer in answers]
    assert any(part != [0, 1, 2] for part in compared)
