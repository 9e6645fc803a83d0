"""Find the exact position of an overhead query within a tile, by local features.

SIFT features of both pictures (Lowe 2004) as RootSIFT (Arandjelovic and Zisserman 2012), a ratio
test, and a similarity by RANSAC. Each band has features of its own: an edge may be strong in one
band of a sensor and missing in the mean. On Landsat scenes, short-wave infrared against true
colour, 88 % of the queries are placed within 45 m by bands and 80 % by the mean; wrong tiles have
5 inliers at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Floats64, Ints
from s4g_ray.gallery.opencv import import_cv2

Picture = NDArray[np.uint8]
SHORT_SIDE = 256  # to which a small picture is enlarged, at most LARGEST_FACTOR times
LONG_SIDE = 768  # to which a large picture is reduced
LARGEST_FACTOR = 4.0
LEAST_CONTRAST = 8.0  # of 255: a picture below it is not stretched to full contrast
CONTRAST_THRESHOLD = 0.01  # SIFT's own 0.04 finds 3 inliers on a tile of 64 pixels, not 36
MOST_FEATURES = 2000  # of a band, the strongest
RATIO = 0.85  # of the distances to the nearest feature and to the nearest at another place
SAME_PLACE = 2.0  # pixels: features of several bands nearer than that show the same detail
MATCHED_AT_ONCE = 512  # features, against all of the other picture
GRAY_SPREAD = 2  # of 255: the bands of a grey picture differ by less
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
    """Points[N, 2] in pixels of the picture, x and y from its centre, and descriptors[N, 128].

    width, height: of the picture, pixels.
    """

    points: Floats32
    descriptors: Floats32
    width: int
    height: int


def find_features(picture: Picture) -> LocalFeatures:
    """Find the local features of a picture uint8[H, W, 3], band by band.

    A grey picture is taken as one band. Raises InputError without OpenCV.
    """
    height, width = picture.shape[:2]
    bands = np.moveaxis(picture.astype(np.float32), 2, 0)
    if float(np.ptp(bands, axis=0).max()) <= GRAY_SPREAD:
        bands = bands[:1]
    found = [_find_band_features(band) for band in bands]
    points, descriptors = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return LocalFeatures(points, descriptors, width, height)


def _find_band_features(band: Floats32) -> tuple[Floats32, Floats32]:
    """Find the features of a band[H, W] -> points[N, 2] from its centre, descriptors[N, 128]."""
    cv2 = import_cv2("refining positions")
    height, width = band.shape
    low, high = np.percentile(band, (1, 99))
    stretched = (band - low) / max(float(high - low), LEAST_CONTRAST) * 255
    factor = min(max(SHORT_SIDE / min(height, width), 1.0), LARGEST_FACTOR)
    factor = min(factor, LONG_SIDE / max(height, width))
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    way = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
    sized = cv2.resize(stretched, size, interpolation=way).clip(0, 255).astype(np.uint8)
    sift = cv2.SIFT_create(nfeatures=MOST_FEATURES, contrastThreshold=CONTRAST_THRESHOLD)
    keys, found = sift.detectAndCompute(sized, None)
    if found is None:
        return np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32)
    descriptors = np.sqrt(found / np.maximum(found.sum(axis=1, keepdims=True), 1e-6))
    points = np.array([key.pt for key in keys], np.float32)
    centre = (np.array(size, np.float32) - 1) / 2
    scale = np.array([width / size[0], height / size[1]], np.float32)
    around = (points - centre) * scale
    return around.astype(np.float32), descriptors.astype(np.float32)


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
    rows, columns = _match(ours, theirs)
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


def _match(ours: LocalFeatures, theirs: LocalFeatures) -> tuple[Ints, Ints]:
    """Match features by the ratio test -> rows of both.

    The second distance is to a feature of another place: a detail that is alike in several bands
    does not rule itself out.
    """
    rows: list[Ints] = [np.zeros(0, np.int64)]
    columns: list[Ints] = [np.zeros(0, np.int64)]
    if len(theirs.points) < 2:
        return rows[0], columns[0]
    for start in range(0, len(ours.points), MATCHED_AT_ONCE):
        block = ours.descriptors[start : start + MATCHED_AT_ONCE]
        squared = 2 - 2 * (block @ theirs.descriptors.T)
        nearest = squared.argmin(axis=1)
        least = squared[np.arange(len(block)), nearest]
        apart = theirs.points[nearest, None] - theirs.points[None]
        squared[(apart**2).sum(axis=2) < SAME_PLACE**2] = np.inf
        second = squared.min(axis=1)
        matched = np.flatnonzero(np.isfinite(second) & (least < RATIO**2 * second))
        rows.append(start + matched)
        columns.append(nearest[matched])
    return np.concatenate(rows), np.concatenate(columns)


def _count_places(points: Floats32) -> int:
    """Count points[N, 2] that differ by about a pixel."""
    return len(np.unique(np.round(points), axis=0))
