"""Measure exact positions by local features, on Landsat scenes of package localtileserver.

python -m benchmarks refine
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.support.record import Cell, record
from s4g_ray.data.sphere import metres_between
from s4g_ray.gallery.fitting.inlier_choice import choose_rule
from s4g_ray.gallery.fitting.refinement_trials import RefinementTrials
from s4g_ray.gallery.fitting.sampling_errors import upper_bound
from s4g_ray.gallery.refinement import find_features, refine_position
from s4g_ray.gallery.search.appearance import describe_look
from tests.support import landsat

NUM_FITTED = 150  # queries of each kind that choose what is accepted; the others are reported
SIDE_M = landsat.METRES * landsat.PIXELS
APART_M = 6000.0  # a wrong tile is that far away, or more
GOAL_M = (30.0, 45.0)


@dataclass(frozen=True)
class Kind:
    """Queries of some bands, compared with their own tile or with one elsewhere."""

    name: str
    bands: tuple[int, ...]
    is_right: bool
    num_reported: int


INFRARED = Kind("infrared (7, 5, 4), right tile", landsat.SWIR, True, 250)
INFRARED_ELSEWHERE = Kind("infrared (7, 5, 4), tile elsewhere", landsat.SWIR, False, 320)
THERMAL_ELSEWHERE = Kind("thermal (6), tile elsewhere", landsat.THERMAL, False, 150)
THERMAL = Kind("thermal (6), right tile", landsat.THERMAL, True, 250)
KINDS = (INFRARED, INFRARED_ELSEWHERE, THERMAL_ELSEWHERE, THERMAL)


def main() -> None:
    measured = {kind: _measure(kind) for kind in KINDS}
    fitted = {kind: _take(trials, slice(0, NUM_FITTED)) for kind, (trials, _) in measured.items()}
    # a search compares right and wrong tiles: both choose
    rule = choose_rule(_join(fitted[INFRARED], fitted[INFRARED_ELSEWHERE]))
    own_rule = choose_rule(_join(fitted[THERMAL], fitted[THERMAL_ELSEWHERE]))
    assert rule.min_inliers is not None
    rows: list[list[Cell]] = []
    for kind, (every, milliseconds) in measured.items():
        trials = _take(every, slice(NUM_FITTED, None))
        is_agreed = trials.inliers >= rule.min_inliers
        is_accepted = rule.accepts(trials)
        within = [f"{(is_accepted & (trials.error_m < goal)).mean():.1%}" for goal in GOAL_M]
        rows.append(
            [
                kind.name,
                len(trials),
                f"{np.median(trials.inliers):.0f}",
                int(trials.inliers.max()),
                f"{is_agreed.mean():.1%}",
                f"{(is_agreed & (trials.error_m < GOAL_M[1])).mean():.1%}",
                int(is_accepted.sum()),
                f"below {upper_bound(int(is_accepted.sum()), len(trials)):.1%}",
                *within,
                f"{np.median(trials.error_m[is_accepted]):.0f}" if is_accepted.any() else "-",
                f"{milliseconds:.0f}",
            ]
        )
    _record(rows, rule.min_inliers, own_rule.report.get("reason"))


def _record(rows: list[list[Cell]], least: int, refusal: str | None) -> None:
    record(
        "refine",
        title="Exact positions by local features",
        text=(
            "queries of 64 pixels, turned by any angle, shifted by up to 8 pixels and scaled by"
            " 0.85 to 1.18, compared with one true-colour tile each (30 m a pixel), all tiles with"
            f" some texture. Accepted: from {least} inliers on, and a photo that looks like the"
            " infrared ones that were placed; both chosen on other queries, infrared only. Shares"
            " are of all queries of the row; the bound is on the share of accepted ones, with 95 %."
            f" Calibrated on thermal queries instead, exact positions are refused: {refusal}. Time"
            " is that of the processor for a query with one tile, features of both included."
        ),
        command="python -m benchmarks refine",
        columns=[
            "query and tile",
            "queries",
            "inliers, median",
            "most",
            "enough inliers",
            "of them within 45 m",
            "accepted",
            "bound",
            "within 30 m",
            "within 45 m",
            "median error, m",
            "ms",
        ],
        rows=rows,
        config={"fitted": NUM_FITTED, "pixels": landsat.PIXELS, "min_inliers": least},
        order=94,
    )


def _measure(kind: Kind) -> tuple[RefinementTrials, float]:
    """Refine queries -> their inliers and errors, and processor milliseconds of each."""
    places = landsat.find_places()
    rng = np.random.default_rng(11)
    scene = landsat.open_scene("landsat.tif", kind.bands)
    tiles = landsat.open_scene()
    count = NUM_FITTED + kind.num_reported
    inliers = np.zeros(count, np.int64)
    error_m = np.full(count, np.inf)
    looks = []
    spent_s = 0.0
    for i, row in enumerate(rng.choice(len(places), count, replace=False)):
        query = landsat.cut_query(scene, float(places.lat[row]), float(places.lon[row]), rng)
        at = int(row) if kind.is_right else _draw_elsewhere(places, int(row), rng)
        lat, lon = float(places.lat[at]), float(places.lon[at])
        tile = tiles.cut(lat, lon)
        started = time.process_time()
        looks.append(describe_look(query.picture))
        refined = refine_position(
            find_features(query.picture), tile, lat=lat, lon=lon, size_m=SIDE_M, min_inliers=0
        )
        spent_s += time.process_time() - started
        if refined is not None:
            inliers[i] = refined.inliers
            error_m[i] = metres_between(query.lat, query.lon, refined.lat, refined.lon)
    trials = RefinementTrials(
        inliers,
        error_m,
        np.full(count, SIDE_M),
        np.full(count, kind.is_right),
        np.array(looks),
        np.zeros(0, np.int64) if kind.is_right else inliers,
    )
    return trials, 1e3 * spent_s / count


def _take(trials: RefinementTrials, part: slice) -> RefinementTrials:
    return RefinementTrials(
        *(getattr(trials, field.name)[part] for field in dataclasses.fields(trials))
    )


def _join(one: RefinementTrials, other: RefinementTrials) -> RefinementTrials:
    return RefinementTrials(
        *(
            np.concatenate([getattr(one, field.name), getattr(other, field.name)])
            for field in dataclasses.fields(one)
        )
    )


def _draw_elsewhere(places: landsat.Places, row: int, rng: np.random.Generator) -> int:
    away = metres_between(places.lat[row], places.lon[row], places.lat, places.lon)
    return int(rng.choice(np.flatnonzero(away >= APART_M)))


if __name__ == "__main__":
    main()
