"""Cut pictures of the Landsat scene: queries of a pose, from above or unrolled into a panorama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.config.data_schema import Size
from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.datasets.imagery.imagery import Source, choose_stretch
from s4g_ray.datasets.imagery.rasters.georeference import GEOD
from s4g_ray.datasets.imagery.resampling import resample
from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.panorama import unroll
from s4g_ray.errors import InputError

Headings = Literal["north", "random"]
QueryKind = Literal["overhead", "panorama"]
Pixels = NDArray[np.uint8]  # [H, W, 3]
INFRARED = (7, 5, 4)
TRUE_COLOR = (3, 2, 1)
STRETCH = Stretch(percentiles=(2.0, 98.0))
MAX_SHIFT = 0.125  # queries: share of the tile's side, on each axis
SCALES = (0.85, 1.18)  # queries: range of the side, relative to the tile's
MIN_TEXTURE = 8.0  # standard deviation of grey levels, in both sensors, of a place with queries


@dataclass(frozen=True)
class LandsatOptions:
    """How tiles and queries are cut. Raises InputError for values out of range."""

    size_m: float = 1920.0  # side of a tile, metres of ground
    pixels: int = 64  # side of a tile and of an overhead query; a panorama: half of it by twice
    queries_per_tile: int = 16  # of the split train
    test_queries_per_tile: int = 4
    seed: int = 0
    # overhead: turned by any angle, shifted and scaled. panorama: unrolled around a shifted point,
    # as far as half a tile's side
    queries: QueryKind = "overhead"
    headings: Headings = "north"  # azimuth of a panorama's centre; it is in heading_deg either way
    train_sizes_m: tuple[float, ...] = ()  # sides of further tiles of the split train

    def __post_init__(self) -> None:
        for name, kind in (("queries", QueryKind), ("headings", Headings)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise InputError(f"--{name} {value!r} is none of {', '.join(get_args(kind))}")
        if self.queries == "overhead" and self.headings != "north":
            raise InputError(
                "--headings random is for --queries panorama; overhead queries have any angle"
            )
        for name, least in (
            ("size_m", 1),
            ("pixels", 8),
            ("queries_per_tile", 1),
            ("test_queries_per_tile", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not least <= value < 1e6:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} {value:g} is not from {least} to below 1,000,000")
        sizes = [self.size_m, *self.train_sizes_m]
        if not all(1 <= size < 1e6 for size in sizes) or len(set(sizes)) < len(sizes):
            further = ",".join(f"{size:.12g}" for size in self.train_sizes_m)
            raise InputError(
                f"--train-sizes-m {further} must be metres from 1 to below 1,000,000, each"
                f" once, and other than --size-m {self.size_m:g}"
            )

    @property
    def panorama_size(self) -> Size:
        """Return height and width of a panorama: distances and azimuths."""
        return self.pixels // 2, 2 * self.pixels

    @property
    def reach_m(self) -> float:
        """Return the largest distance of a query's ground from its tile's centre."""
        return self.size_m * (SCALES[1] / 2 + MAX_SHIFT) * 2**0.5


@dataclass(frozen=True)
class Pose:
    """How a query lies on the ground, relative to its tile."""

    azimuth_deg: float  # of the query's upward direction or its centre column, clockwise from north
    east_m: float
    north_m: float
    scale: float


def draw_pose(options: LandsatOptions, tile_id: int, number: int) -> Pose:
    """Draw the pose of a tile's query, from a generator keyed by (seed, tile, number)."""
    rng = np.random.default_rng((options.seed, tile_id, number))
    azimuth_deg = float(rng.uniform(0, 360))
    east, north = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * options.size_m
    scale = float(np.exp(rng.uniform(*np.log(SCALES))))
    if options.queries == "panorama":
        scale = 1.0
        # heading_deg is a float32: it then tells the very angle
        azimuth_deg = float(np.float32(azimuth_deg)) if options.headings == "random" else 0.0
    return Pose(azimuth_deg, float(east), float(north), scale)


@dataclass(frozen=True)
class Sensor:
    """Three bands of a scene: pixels[H, W, 3], stretched, and where they lie."""

    source: Source
    pixels: Pixels

    @classmethod
    def open(cls, path: str, bands: tuple[int, int, int]) -> Sensor:
        """Read bands of a scene whole. Raises InputError as open_imagery does."""
        imagery = open_imagery(path, bands=bands)
        (source,) = imagery.sources
        place = source.georeference
        piece = source.read(0, 0, place.width, place.height, 1)
        return cls(source, choose_stretch(imagery, STRETCH).apply(piece.values))

    def holds(self, lat: Floats64, lon: Floats64, reach_m: float) -> Bools:
        """Return whether squares of 2 reach_m about points [N] lie in the scene."""
        corners = move(lat[:, None], lon[:, None], *square_corners(2 * reach_m, 0.0))
        column, row = self.source.georeference.to_pixels(*corners)
        height, width = self.pixels.shape[:2]
        inside = (column >= 0) & (column <= width) & (row >= 0) & (row <= height)
        return np.asarray(inside.all(axis=1))

    def is_textured(self, options: LandsatOptions, lat: Floats64, lon: Floats64) -> Bools:
        """Return whether tiles about points [N] show more than a plain surface."""
        north_up = Pose(0.0, 0.0, 0.0, 1.0)
        pictures = (self.cut(options, *at, north_up) for at in zip(lat, lon, strict=True))
        return np.array([picture.mean(axis=2).std() >= MIN_TEXTURE for picture in pictures])

    def cut(self, options: LandsatOptions, lat: float, lon: float, pose: Pose) -> Pixels:
        """Cut the overhead picture of a pose about a tile's centre: [pixels, pixels, 3]."""
        side = options.size_m * pose.scale
        points = self._find_corners(lat, lon, pose, side, pose.azimuth_deg)
        picture = np.zeros((options.pixels, options.pixels, 3), np.uint8)
        filled = np.zeros(picture.shape[:2], np.uint8)
        num_source = side / self.source.georeference.resolution_m / options.pixels
        samples = max(1, round(num_source))
        resample(self.pixels, np.empty((0, 0), np.uint8), points, samples, picture, filled)
        return picture

    def unroll(self, options: LandsatOptions, lat: float, lon: float, pose: Pose) -> Pixels:
        """Cut the panorama of a pose about a tile's centre: [pixels / 2, 2 pixels, 3]."""
        points = self._find_corners(lat, lon, pose, options.size_m * pose.scale, 0.0)
        return unroll(self.pixels, points, options.panorama_size, pose.azimuth_deg)

    def _find_corners(
        self, lat: float, lon: float, pose: Pose, side_m: float, azimuth_deg: float
    ) -> Floats64:
        """Return column and row [2, 2, 2] of the corners of a square about a pose's centre."""
        centre = move(lat, lon, np.array([pose.east_m]), np.array([pose.north_m]))
        corners = move(*centre, *square_corners(side_m, azimuth_deg))
        column, row = self.source.georeference.to_pixels(*corners)
        return np.stack([column, row], axis=-1).reshape(2, 2, 2)


def square_corners(side_m: float, azimuth_deg: float) -> tuple[Floats64, Floats64]:
    """Return metres east and north [4] of a square's corners, row by row of its picture."""
    right, up = np.array([[-0.5, 0.5, -0.5, 0.5], [0.5, 0.5, -0.5, -0.5]]) * side_m
    angle = np.radians(azimuth_deg)
    return right * np.cos(angle) + up * np.sin(angle), up * np.cos(angle) - right * np.sin(angle)


def move(lat: Any, lon: Any, east_m: Floats64, north_m: Floats64) -> tuple[Floats64, Floats64]:
    """Return latitude and longitude of points, in metres from others, along geodesics."""
    lon, lat, azimuth, metres = np.broadcast_arrays(
        lon, lat, np.degrees(np.arctan2(east_m, north_m)), np.hypot(east_m, north_m)
    )
    moved_lon, moved_lat, _ = GEOD.fwd(lon.ravel(), lat.ravel(), azimuth.ravel(), metres.ravel())
    return np.asarray(moved_lat).reshape(lat.shape), np.asarray(moved_lon).reshape(lat.shape)
