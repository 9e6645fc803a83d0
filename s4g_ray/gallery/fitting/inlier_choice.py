"""Choose how many inliers a refined position needs, and which photos are refined at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from s4g_ray.arrays import Bools
from s4g_ray.data.image_table import ImageTable
from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import Calibration
from s4g_ray.gallery.fitting.held_out import HeldOut
from s4g_ray.gallery.fitting.refinement_trials import (
    RefinementTrials,
    TileFeatures,
    refine_queries,
)
from s4g_ray.gallery.fitting.sampling_errors import upper_bound
from s4g_ray.gallery.locate import needed_size
from s4g_ray.gallery.refinement import LEAST_INLIERS
from s4g_ray.gallery.search.appearance import Appearance

if TYPE_CHECKING:
    from s4g_ray.gallery.gallery import Gallery

MOST_WRONG = 0.05  # of the positions that are accepted
# of the queries with a right tile, that must be placed: features that find fewer match by chance
# of the scene, and nothing tells for which
LEAST_PLACED = 0.5
FEWEST_ACCEPTED = 10  # below which nothing can be said about them
LARGEST = 200


@dataclass(frozen=True)
class RefinementRule:
    """Which positions are accepted; min_inliers None: none. report: as JSON has it."""

    min_inliers: int | None
    appearance: Appearance | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def accepts(self, trials: RefinementTrials) -> Bools:
        """Return which of M trials give a position that is accepted."""
        if self.min_inliers is None:
            return np.zeros(len(trials), bool)
        is_accepted = trials.inliers >= self.min_inliers
        if self.appearance is not None:
            is_accepted &= self.appearance.distances(trials.looks) <= self.appearance.limit
        return is_accepted


def measure_refinement(
    gallery: Gallery,
    queries: ImageTable,
    first: HeldOut,
    second: HeldOut,
    calibration: Calibration,
) -> RefinementRule:
    """Choose a rule on the first half of the queries, and describe it on the second.

    It accepts nothing, and gives the reason, where OpenCV is not installed or local features do
    not place the queries reliably.
    """
    tiles = TileFeatures(gallery)
    least = needed_size(gallery)
    try:
        fitted = refine_queries(tiles, queries, first, calibration, least)
    except InputError as error:
        return RefinementRule(None, report={"min_inliers": None, "reason": str(error)})
    rule = choose_rule(fitted)
    if rule.min_inliers is None:
        return rule
    tested = refine_queries(tiles, queries, second, calibration, least)
    return RefinementRule(rule.min_inliers, rule.appearance, describe_rule(rule, tested))


def choose_rule(trials: RefinementTrials) -> RefinementRule:
    """Choose the least inliers, and the look of photos that are refined.

    Accepts nothing where local features do not place such photos reliably: too few positions, too
    many wrong ones, or fewer than LEAST_PLACED of the queries whose right tile was compared.
    """
    least = choose_min_inliers(trials)
    if least is None:
        return _refuse(trials, "local features place too few of the queries")
    is_placed = (trials.inliers >= least) & ~trials.is_wrong()
    num_right = int(trials.has_right_tile.sum())
    num_placed = int((is_placed & trials.has_right_tile).sum())
    if num_placed < LEAST_PLACED * num_right:
        return _refuse(
            trials,
            f"local features place {num_placed} of {num_right} queries whose tile is right;"
            f" {LEAST_PLACED:.0%} are needed to rely on them",
        )
    return RefinementRule(least, Appearance.fit(trials.looks[is_placed]))


def _refuse(trials: RefinementTrials, reason: str) -> RefinementRule:
    report = {"num_queries": len(trials), "min_inliers": None, "reason": reason}
    return RefinementRule(None, report=report)


def choose_min_inliers(trials: RefinementTrials) -> int | None:
    """Choose the least inliers from which on less than MOST_WRONG of the positions are wrong.

    Counts one wrong position more than was seen (Laplace). They are more than any comparison with
    a tile elsewhere has. None where fewer than FEWEST_ACCEPTED are accepted: such queries show
    nothing that local features could find.
    """
    wrong = trials.is_wrong()
    first = max(LEAST_INLIERS, int(trials.elsewhere_inliers.max(initial=0))) + 1
    for least in range(first, LARGEST):
        is_accepted = trials.inliers >= least
        count = int(is_accepted.sum())
        if count < FEWEST_ACCEPTED:
            return None
        if (int(wrong[is_accepted].sum()) + 1) / (count + 2) < MOST_WRONG or (
            count < 1 / MOST_WRONG and not wrong[is_accepted].any()
        ):
            return least
    return None


def describe_rule(rule: RefinementRule, trials: RefinementTrials) -> dict[str, Any]:
    """Describe what a rule accepts of queries that it was not chosen on, as JSON has it.

    most_false: the 95 % bound on the share of tiles elsewhere that are taken for a position.
    """
    is_accepted = rule.accepts(trials)
    is_wrong = trials.is_wrong()
    has_right = trials.has_right_tile
    least = rule.min_inliers
    num_false = 0 if least is None else int((trials.elsewhere_inliers >= least).sum())
    num_elsewhere = len(trials.elsewhere_inliers)
    looks_unusual = None
    if rule.appearance is not None and len(trials):
        distances = rule.appearance.distances(trials.looks)
        looks_unusual = float((distances > rule.appearance.limit).mean())
    return {
        "num_queries": len(trials),
        "min_inliers": least,
        "accepted": float(is_accepted.mean()) if len(trials) else 0.0,
        "looks_unusual": looks_unusual,
        "wrong_of_accepted": float(is_wrong[is_accepted].mean()) if is_accepted.any() else 0.0,
        "num_right_tiles": int(has_right.sum()),
        "found_of_right_tiles": float(is_accepted[has_right].mean()) if has_right.any() else 0.0,
        "num_elsewhere": num_elsewhere,
        "false_of_elsewhere": num_false,
        "most_false": upper_bound(num_false, num_elsewhere),
        "median_error_m": (
            float(np.median(trials.error_m[is_accepted])) if is_accepted.any() else None
        ),
    }
