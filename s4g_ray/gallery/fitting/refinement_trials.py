"""Refine held-out queries by their best candidates, as `s4g locate --refine` does."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.config.data_schema import Size
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.sphere import metres_between
from s4g_ray.gallery.calibration import Calibration
from s4g_ray.gallery.fitting.held_out import APART_SIZES, HeldOut
from s4g_ray.gallery.fitting.query_search import read_queries
from s4g_ray.gallery.refinement import (
    LEAST_INLIERS,
    LocalFeatures,
    find_features,
    refine_position,
)
from s4g_ray.gallery.search.appearance import NUM_VALUES, describe_look
from s4g_ray.gallery.search.candidates import Found, group_cells
from s4g_ray.gallery.search.options import LocateOptions
from s4g_ray.gallery.search.refine import NUM_REFINED

if TYPE_CHECKING:
    from s4g_ray.gallery.gallery import Gallery

MOST_QUERIES = 150  # that are refined: 0.1 to 0.2 s each
FEATURE_BYTES = 256_000_000  # of tiles' features that are kept
TOLERANCE_SIZES = 0.025  # of a right position, in tile sides: 48 m of 1,920


@dataclass(frozen=True)
class RefinementTrials:
    """The best refined position of each of M queries: inliers[M], 0 for none, and error_m[M].

    size_m[M]: of its tile. has_right_tile[M]: a compared candidate is the right one. looks[M, F]:
    by describe_look. elsewhere_inliers[C]: of each comparison with a tile that shows other ground.
    """

    inliers: Ints
    error_m: Floats64
    size_m: Floats64
    has_right_tile: Bools
    looks: Floats64
    elsewhere_inliers: Ints

    def __len__(self) -> int:
        return len(self.inliers)

    def is_wrong(self) -> Bools:
        """Return which positions are farther off than TOLERANCE_SIZES."""
        return np.asarray(self.error_m > TOLERANCE_SIZES * self.size_m)


class TileFeatures:
    """The local features of a gallery's tiles, kept up to FEATURE_BYTES.

    Queries of one region share candidates.
    """

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._known: OrderedDict[int, LocalFeatures] = OrderedDict()
        self._num_bytes = 0

    def find(self, tile_id: int) -> LocalFeatures:
        """Return the features of a tile. Raises KeyError and RunError as Gallery.read_tile."""
        known = self._known.pop(tile_id, None)
        if known is None:
            known = find_features(self._gallery.read_tile(tile_id))
            self._num_bytes += _count_bytes(known)
        self._known[tile_id] = known  # the latest comes last
        while self._num_bytes > FEATURE_BYTES and len(self._known) > 1:
            self._num_bytes -= _count_bytes(self._known.popitem(last=False)[1])
        return known


def _count_bytes(features: LocalFeatures) -> int:
    return features.points.nbytes + features.descriptors.nbytes


def refine_queries(
    tiles: TileFeatures,
    queries: ImageTable,
    held: HeldOut,
    calibration: Calibration,
    least: Size | None,
) -> RefinementTrials:
    """Refine up to MOST_QUERIES queries by their best candidates; the most inliers count.

    least: height and width of a photo in pixels that suffice. Raises InputError without OpenCV.
    """
    rows = np.flatnonzero(np.isfinite(held.true_lat))
    if len(rows) > MOST_QUERIES:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST_QUERIES, replace=False))
    chosen = held.take(rows)
    right = chosen.right()
    compared = compared_columns(chosen, calibration)
    found: list[tuple[Any, ...]] = []
    looks: list[Floats64] = []
    elsewhere: list[int] = []
    for row in range(len(chosen)):
        picture = read_queries(queries, chosen.rows[row : row + 1], least)[0]
        if picture is None:
            continue
        best, wrong = _refine_query(tiles, picture, chosen, row, compared[row])
        found.append((*best, right[row] in compared[row]))
        looks.append(describe_look(picture))
        elsewhere.extend(wrong)
    columns = np.array(found, np.float64).reshape(-1, 4)
    return RefinementTrials(
        inliers=columns[:, 0].astype(np.int64),
        error_m=columns[:, 1],
        size_m=columns[:, 2],
        has_right_tile=columns[:, 3] > 0,
        looks=np.array(looks).reshape(-1, NUM_VALUES),
        elsewhere_inliers=np.array(elsewhere, np.int64),
    )


def _refine_query(
    tiles: TileFeatures, picture: Any, chosen: HeldOut, row: int, columns: list[int]
) -> tuple[tuple[int, float, float], list[int]]:
    """Compare one query -> its best (inliers, error_m, size_m), and inliers of tiles elsewhere."""
    ours = find_features(picture)
    best = (0, np.inf, float(chosen.size_m[row, 0]))
    elsewhere = []
    for column in columns:
        lat, lon, size_m = (
            float(values[row, column]) for values in (chosen.lat, chosen.lon, chosen.size_m)
        )
        if not np.isfinite([lat, lon, size_m]).all():
            continue
        refined = refine_position(
            ours,
            tiles.find(int(chosen.ids[row, column])),
            lat=lat,
            lon=lon,
            size_m=size_m,
            min_inliers=LEAST_INLIERS,
        )
        truth = (chosen.true_lat[row], chosen.true_lon[row])
        if metres_between(lat, lon, *truth) > APART_SIZES * size_m:
            elsewhere.append(0 if refined is None else refined.inliers)
        if refined is not None and refined.inliers > best[0]:
            error = float(metres_between(refined.lat, refined.lon, *truth))
            best = (refined.inliers, error, size_m)
    return best, elsewhere


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
