"""Find the exact position of an overhead query within a tile, by local features.

SIFT features of both pictures (Lowe 2004) as RootSIFT (Arandjelovic and Zisserman 2012), a ratio
test, and a similarity by RANSAC. On Landsat scenes, short-wave infrared against true colour, right
tiles have 36 inliers in the median, wrong ones 0 and at most 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Floats64
from s4g_ray.gallery.opencv import import_cv2

Picture = NDArray[np.uint8]
SHORT_SIDE = 256  # to which a small picture is enlarged, at most LARGEST_FACTOR times
LONG_SIDE = 768  # to which a large picture is reduced
LARGEST_FACTOR = 4.0
LEAST_CONTRAST = 8.0  # of 255: a picture below it is not stretched to full contrast
CONTRAST_THRESHOLD = 0.01  # SIFT's own 0.04 finds 3 inliers on a tile of 64 pixels, not 36
RATIO = 0.85  # of the distances to the nearest and the second feature
REACH_SHARE = 0.023  # of a tile's side: how far a match may lie off
LEAST_SCALE, MOST_SCALE = 0.6, 1.6  # a query's width on the ground, in tile sides
LEAST_INLIERS = 4  # two matches always fit a similarity; three often do


@dataclass(frozen=True)
class Refined:
    """The position of a query's centre, by local features.

    heading_deg: azimuth of the query's upward direction. scale: the query's width on the ground,
    in tile sides.
    """

    lat: float
    lon: float
    inliers: int
    heading_deg: float
    scale: float
    tile_id: int | None = None


@dataclass(frozen=True)
class LocalFeatures:
    """Points[N, 2] in pixels of the picture, x and y from its centre, and descriptors[N, 128]."""

    points: Floats32
    descriptors: Floats32
    width: int
    height: int


def find_features(picture: Picture) -> LocalFeatures:
    """Find the local features of a picture uint8[H, W, 3]. Raises InputError without OpenCV."""
    cv2 = import_cv2("refining positions")
    height, width = picture.shape[:2]
    gray = picture.astype(np.float32).mean(axis=2)
    low, high = np.percentile(gray, (1, 99))
    gray = (gray - low) / max(float(high - low), LEAST_CONTRAST) * 255
    factor = min(max(SHORT_SIDE / min(height, width), 1.0), LARGEST_FACTOR)
    factor = min(factor, LONG_SIDE / max(height, width))
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    way = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
    sized = cv2.resize(gray, size, interpolation=way).clip(0, 255).astype(np.uint8)
    keys, found = cv2.SIFT_create(contrastThreshold=CONTRAST_THRESHOLD).detectAndCompute(
        sized, None
    )
    if found is None:
        nothing = np.zeros((0, 2), np.float32)
        return LocalFeatures(nothing, np.zeros((0, 128), np.float32), width, height)
    descriptors = np.sqrt(found / np.maximum(found.sum(axis=1, keepdims=True), 1e-6))
    points = np.array([key.pt for key in keys], np.float32)
    centre = (np.array(size, np.float32) - 1) / 2
    scale = np.array([width / size[0], height / size[1]], np.float32)
    around = (points - centre) * scale
    return LocalFeatures(around.astype(np.float32), descriptors.astype(np.float32), width, height)


def refine_position(
    query: Picture | LocalFeatures,
    tile: Picture | LocalFeatures,
    *,
    lat: float,
    lon: float,
    size_m: float,
    min_inliers: int,
    tile_id: int | None = None,
) -> Refined | None:
    """Find where a query's centre lies, by a tile that shows the same ground.

    query uint8[H, W, 3]: an overhead picture of any orientation. tile uint8[H, W, 3]: north up,
    size_m metres on a side about lat, lon. Give the query's features instead to compare it with
    several tiles. Returns None with fewer than min_inliers matches that agree, one match a feature
    of either picture, or when they agree on a mirrored or far larger or smaller query. Raises
    InputError without OpenCV.
    """
    ours = query if isinstance(query, LocalFeatures) else find_features(query)
    theirs = tile if isinstance(tile, LocalFeatures) else find_features(tile)
    similarity, inliers = _fit_similarity(ours, theirs)
    if similarity is None or inliers < max(min_inliers, LEAST_INLIERS):
        return None
    from pyproj import Geod

    metres = size_m / theirs.width  # a pixel of the tile
    east, south = similarity[:, 2] * metres
    up = similarity[:, :2] @ np.array([0.0, -1.0])
    azimuth = float(np.degrees(np.arctan2(east, -south)))
    there_lon, there_lat, _ = Geod(ellps="WGS84").fwd(
        lon, lat, azimuth, float(np.hypot(east, south))
    )
    return Refined(
        lat=float(there_lat),
        lon=float(there_lon),
        inliers=inliers,
        heading_deg=float(np.degrees(np.arctan2(up[0], -up[1]))) % 360,
        scale=float(np.hypot(*up)) * ours.width / theirs.width,
        tile_id=tile_id,
    )


def _fit_similarity(ours: LocalFeatures, theirs: LocalFeatures) -> tuple[Floats64 | None, int]:
    """Fit a similarity [2, 3] from our pixels to theirs, and count the matches that agree."""
    cv2 = import_cv2("refining positions")
    rows, columns = _match(ours.descriptors, theirs.descriptors)
    if len(rows) < LEAST_INLIERS:
        return None, 0
    source = ours.points[rows]
    target = theirs.points[columns]
    found, is_inlier = cv2.estimateAffinePartial2D(
        source,
        target,
        method=cv2.RANSAC,
        ransacReprojThreshold=REACH_SHARE * theirs.width,
        maxIters=2000,
        confidence=0.995,
    )
    if found is None:
        return None, 0
    similarity: Floats64 = np.asarray(found, np.float64)
    scale = float(np.sqrt(abs(np.linalg.det(similarity[:, :2])))) * ours.width / theirs.width
    if not LEAST_SCALE <= scale <= MOST_SCALE:
        return None, 0
    agreed = np.asarray(is_inlier).ravel() > 0
    # many features of one picture may match one of the other: they count once
    count = min(_count_places(source[agreed]), _count_places(target[agreed]))
    return similarity, count


def _match(ours: Floats32, theirs: Floats32) -> tuple[NDArray[Any], NDArray[Any]]:
    """Match unit descriptors[N, 128], [M, 128] by the ratio test -> rows of both."""
    if len(theirs) < 2 or not len(ours):
        nothing = np.zeros(0, np.int64)
        return nothing, nothing
    squared = 2 - 2 * (ours @ theirs.T)
    two = np.argpartition(squared, 1, axis=1)[:, :2]
    values = np.take_along_axis(squared, two, axis=1)
    nearest = np.where(values[:, 0] <= values[:, 1], two[:, 0], two[:, 1])
    rows = np.flatnonzero(values.min(axis=1) < RATIO**2 * values.max(axis=1))
    return rows, nearest[rows]


def _count_places(points: Floats32) -> int:
    """Count points[N, 2] that differ by about a pixel."""
    return len(np.unique(np.round(points), axis=0))
