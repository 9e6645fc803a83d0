"""Measure exact positions by local features, on Landsat scenes of package localtileserver.

python -m benchmarks refine
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from benchmarks.support.record import Cell, record
from s4g_ray.data.sphere import metres_between
from s4g_ray.gallery.fitting.inlier_choice import Refinements, choose_min_inliers
from s4g_ray.gallery.refinement import find_features, refine_position
from tests.support import landsat

NUM_QUERIES = 240  # half of them choose the inliers, the other half is reported
SIDE_M = landsat.METRES * landsat.PIXELS
APART_M = 6000.0  # a wrong tile is that far away, or more
GOAL_M = (30.0, 45.0)


@dataclass(frozen=True)
class Kind:
    """Queries of some bands, compared with their own tile or with one elsewhere."""

    name: str
    bands: tuple[int, ...]
    is_right: bool


KINDS = (
    Kind("infrared (7, 5, 4), right tile", landsat.SWIR, True),
    Kind("infrared (7, 5, 4), tile elsewhere", landsat.SWIR, False),
    Kind("thermal (6), tile elsewhere", landsat.THERMAL, False),
    Kind("thermal (6), right tile", landsat.THERMAL, True),
)


def main() -> None:
    measured = {kind.name: _measure(kind) for kind in KINDS}
    half = NUM_QUERIES // 2
    right, elsewhere = (measured[kind.name][0] for kind in KINDS[:2])
    # a search compares right and wrong tiles: both choose
    least = choose_min_inliers(
        Refinements(
            np.concatenate([right.inliers[:half], elsewhere.inliers[:half]]),
            np.concatenate([right.error_m[:half], elsewhere.error_m[:half]]),
            np.full(2 * half, SIDE_M),
            np.repeat([1, 0], half),
        )
    )
    assert least is not None
    rows: list[list[Cell]] = []
    for kind in KINDS:
        found, milliseconds = measured[kind.name]
        inliers, error_m = found.inliers[half:], found.error_m[half:]
        is_accepted = inliers >= least
        within = [f"{(is_accepted & (error_m < goal)).mean():.1%}" for goal in GOAL_M]
        rows.append(
            [
                kind.name,
                f"{np.median(inliers):.0f}",
                int(inliers.max()),
                f"{is_accepted.mean():.1%}",
                *within,
                f"{np.median(error_m[is_accepted]):.0f}" if is_accepted.any() else "-",
                f"{milliseconds:.0f}",
            ]
        )
    record(
        "refine",
        title="Exact positions by local features",
        text=(
            "queries of 64 pixels, turned by any angle, shifted by up to 8 pixels and scaled by"
            " 0.85 to 1.18, compared with one true-colour tile each (30 m a pixel), all tiles with"
            f" some texture. Accepted from {least} inliers on, chosen on the other half of the"
            " queries. Shares are of all queries of the row. Time is that of the processor for a"
            " query with one tile, features of both included."
        ),
        command="python -m benchmarks refine",
        columns=[
            "query and tile",
            "inliers, median",
            "most",
            "accepted",
            "within 30 m",
            "within 45 m",
            "median error, m",
            "ms",
        ],
        rows=rows,
        config={"queries": NUM_QUERIES - half, "pixels": landsat.PIXELS, "min_inliers": least},
        order=94,
    )


def _measure(kind: Kind) -> tuple[Refinements, float]:
    """Refine queries -> their inliers and errors, and processor milliseconds of each."""
    places = landsat.find_places()
    rng = np.random.default_rng(11)
    scene = landsat.open_scene("landsat.tif", kind.bands)
    tiles = landsat.open_scene()
    inliers = np.zeros(NUM_QUERIES, np.int64)
    error_m = np.full(NUM_QUERIES, np.inf)
    spent_s = 0.0
    for i, row in enumerate(rng.choice(len(places), NUM_QUERIES, replace=False)):
        query = landsat.cut_query(scene, float(places.lat[row]), float(places.lon[row]), rng)
        at = int(row) if kind.is_right else _draw_elsewhere(places, int(row), rng)
        lat, lon = float(places.lat[at]), float(places.lon[at])
        tile = tiles.cut(lat, lon)
        started = time.process_time()
        refined = refine_position(
            find_features(query.picture), tile, lat=lat, lon=lon, size_m=SIDE_M, min_inliers=0
        )
        spent_s += time.process_time() - started
        if refined is not None:
            inliers[i] = refined.inliers
            error_m[i] = metres_between(query.lat, query.lon, refined.lat, refined.lon)
    found = Refinements(
        inliers,
        error_m,
        np.full(NUM_QUERIES, SIDE_M),
        np.full(NUM_QUERIES, int(kind.is_right)),
    )
    return found, 1e3 * spent_s / NUM_QUERIES


def _draw_elsewhere(places: landsat.Places, row: int, rng: np.random.Generator) -> int:
    away = metres_between(places.lat[row], places.lon[row], places.lat, places.lon)
    return int(rng.choice(np.flatnonzero(away >= APART_M)))


if __name__ == "__main__":
    main()
