"""Choose how many inliers a refined position needs, on queries whose position is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.sphere import metres_between
from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import Calibration
from s4g_ray.gallery.fitting.held_out import HeldOut
from s4g_ray.gallery.fitting.query_search import read_queries
from s4g_ray.gallery.refinement import LEAST_INLIERS, find_features, refine_position
from s4g_ray.gallery.search.candidates import Found, group_cells
from s4g_ray.gallery.search.options import LocateOptions
from s4g_ray.gallery.search.refine import NUM_REFINED

if TYPE_CHECKING:
    from s4g_ray.gallery.gallery import Gallery

MOST_QUERIES = 150  # that are refined: 0.1 to 0.2 s each
TOLERANCE_SIZES = 0.025  # of a right position, in tile sides: 48 m of 1,920
MOST_WRONG = 0.05  # of the positions that are accepted
FEWEST_ACCEPTED = 10  # below which nothing can be said about them
LARGEST = 200


@dataclass(frozen=True)
class Refinements:
    """The best refined position of each of M queries: inliers[M], 0 for none, and error_m[M]."""

    inliers: Ints
    error_m: Floats64
    size_m: Floats64  # of its tile
    has_right_tile: Ints  # 1: a compared candidate is the right one

    def is_wrong(self) -> Ints:
        """Return 1 for positions farther off than TOLERANCE_SIZES."""
        return (self.error_m > TOLERANCE_SIZES * self.size_m).astype(np.int64)


def compared_columns(held: HeldOut, calibration: Calibration) -> list[list[int]]:
    """Choose the candidates that locating compares with each of M queries -> their columns.

    They are the best tiles of the most probable groups of overlapping ones.
    """
    found = Found(held.ids, held.scores, np.zeros_like(held.ids))
    groups = group_cells(found, held.lat, held.lon, held.size_m, LocateOptions.top)
    shares, _ = calibration.shares(held.scores)
    chosen = []
    for group, share in zip(groups, shares, strict=True):
        is_grouped = group >= 0
        order = np.argsort(-np.bincount(group[is_grouped], share[is_grouped]), kind="stable")
        chosen.append([int(np.argmax(group == number)) for number in order[:NUM_REFINED]])
    return chosen


def refine_queries(
    gallery: Gallery, queries: ImageTable, held: HeldOut, calibration: Calibration
) -> Refinements:
    """Refine up to MOST_QUERIES queries by their best candidates; the most inliers count."""
    rows = np.flatnonzero(np.isfinite(held.true_lat))
    if len(rows) > MOST_QUERIES:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST_QUERIES, replace=False))
    chosen = held.take(rows)
    right = chosen.right()
    compared = compared_columns(chosen, calibration)
    found = []
    for row in range(len(chosen)):
        picture = read_queries(queries, chosen.rows[row : row + 1], None)[0]
        if picture is None:
            continue
        ours = find_features(picture)
        best = (0, np.inf, float(chosen.size_m[row, 0]))
        for column in compared[row]:
            size_m = float(chosen.size_m[row, column])
            if not np.isfinite([size_m, chosen.lat[row, column], chosen.lon[row, column]]).all():
                continue
            refined = refine_position(
                ours,
                gallery.read_tile(int(chosen.ids[row, column])),
                lat=float(chosen.lat[row, column]),
                lon=float(chosen.lon[row, column]),
                size_m=size_m,
                min_inliers=LEAST_INLIERS,
            )
            if refined is not None and refined.inliers > best[0]:
                error = metres_between(
                    refined.lat, refined.lon, chosen.true_lat[row], chosen.true_lon[row]
                )
                best = (refined.inliers, float(error), size_m)
        found.append((*best, int(right[row] in compared[row])))
    columns = np.array(found, np.float64).reshape(-1, 4)
    return Refinements(
        inliers=columns[:, 0].astype(np.int64),
        error_m=columns[:, 1],
        size_m=columns[:, 2],
        has_right_tile=columns[:, 3].astype(np.int64),
    )


def choose_min_inliers(refinements: Refinements) -> int | None:
    """Choose the least inliers from which on less than MOST_WRONG of the positions are wrong.

    Counts one wrong position more than was seen (Laplace). None where fewer than FEWEST_ACCEPTED
    are accepted: such queries show nothing that local features could find.
    """
    wrong = refinements.is_wrong()
    for least in range(LEAST_INLIERS + 1, LARGEST):
        is_accepted = refinements.inliers >= least
        count = int(is_accepted.sum())
        if count < FEWEST_ACCEPTED:
            return None
        if (int(wrong[is_accepted].sum()) + 1) / (count + 2) < MOST_WRONG or (
            count < 1 / MOST_WRONG and not wrong[is_accepted].any()
        ):
            return least
    return None


def describe_refinements(refinements: Refinements, min_inliers: int | None) -> dict[str, object]:
    """Describe what a number of inliers accepts, as JSON has it."""
    if min_inliers is None:
        return {"num_queries": len(refinements.inliers), "min_inliers": None}
    is_accepted = refinements.inliers >= min_inliers
    wrong = refinements.is_wrong()
    has_right = refinements.has_right_tile > 0
    return {
        "num_queries": len(refinements.inliers),
        "min_inliers": min_inliers,
        "accepted": float(is_accepted.mean()),
        "wrong_of_accepted": float(wrong[is_accepted].mean()) if is_accepted.any() else 0.0,
        "found_of_right_tiles": float(is_accepted[has_right].mean()) if has_right.any() else 0.0,
        "median_error_m": float(np.median(refinements.error_m[is_accepted]))
        if is_accepted.any()
        else None,
    }


def measure_min_inliers(
    gallery: Gallery,
    queries: ImageTable,
    first: HeldOut,
    second: HeldOut,
    calibration: Calibration,
) -> tuple[int | None, dict[str, object]]:
    """Choose min_inliers on the first half of the queries, and describe it on the second.

    None, with the reason, where OpenCV is not installed or nothing can be said.
    """
    try:
        fitted = refine_queries(gallery, queries, first, calibration)
    except InputError as error:
        return None, {"min_inliers": None, "reason": str(error)}
    chosen = choose_min_inliers(fitted)
    if chosen is None:
        report = describe_refinements(fitted, None)
        return None, {**report, "reason": "local features place too few of the queries"}
    tested = refine_queries(gallery, queries, second, calibration)
    return chosen, describe_refinements(tested, chosen)
