"""Cut tiles and queries from the Landsat scenes that the package localtileserver ships.

`landsat.tif` (Landsat 7, 30 m, seven bands, Great Salt Lake) gives true-colour tiles and queries
of other bands; `landsat7.tif` (San Francisco) gives queries from elsewhere. Each picture is
sampled about its centre in metres on WGS 84, independently of s4g_ray's own cutting.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer

Picture = NDArray[np.uint8]
TRUE_COLOR = (3, 2, 1)
SWIR = (7, 5, 4)
THERMAL = (6, 6, 6)
FALSE_COLOR = (1, 2, 3)  # all that landsat7.tif has
METRES = 30.0  # a pixel
PIXELS = 64
EQUATOR_M = 6_378_137.0
ECCENTRICITY_2 = 0.00669437999014  # squared, of WGS 84


def data_path(name: str) -> str:
    """Return the path of a file that localtileserver ships."""
    spec = importlib.util.find_spec("localtileserver")
    assert spec is not None
    assert spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0]) / "tiler" / "data" / name)


@dataclass(frozen=True)
class Scene:
    """Three bands of a raster: pixels[H, W, 3] and the way from lon, lat to rows and columns."""

    pixels: Picture
    to_raster: Transformer
    inverse: tuple[float, ...]  # affine, of x, y of the raster's CRS to column, row

    def columns_and_rows(
        self, lat: NDArray[Any], lon: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return positions in pixels, the centre of the first pixel at 0, 0."""
        x, y = self.to_raster.transform(lon, lat)
        a, b, c, d, e, f = self.inverse
        return a * x + b * y + c - 0.5, d * x + e * y + f - 0.5

    def cut(
        self,
        lat: float,
        lon: float,
        *,
        turn_deg: float = 0.0,
        metres: float = METRES,
        pixels: int = PIXELS,
    ) -> Picture:
        """Sample a square about a point; its upward direction has azimuth turn_deg."""
        steps = (np.arange(pixels) - (pixels - 1) / 2) * metres
        right, down = np.meshgrid(steps, steps)
        turn = np.radians(turn_deg)
        east = right * np.cos(turn) - down * np.sin(turn)
        north = -right * np.sin(turn) - down * np.cos(turn)
        lats, lons = move(lat, lon, east, north)
        columns, rows = self.columns_and_rows(lats, lons)
        found = cv2.remap(
            self.pixels,
            columns.astype(np.float32),
            rows.astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
        )
        return np.asarray(found, np.uint8)


def move(lat: float, lon: float, east_m: Any, north_m: Any) -> tuple[Any, Any]:
    """Move a point by metres on WGS 84, by its radii of curvature: exact to 0.1 m within 2 km."""
    sine = np.sin(np.radians(lat))
    normal = EQUATOR_M / np.sqrt(1 - ECCENTRICITY_2 * sine**2)
    meridian = normal * (1 - ECCENTRICITY_2) / (1 - ECCENTRICITY_2 * sine**2)
    return (
        lat + np.degrees(north_m / meridian),
        lon + np.degrees(east_m / (normal * np.cos(np.radians(lat)))),
    )


@cache
def open_scene(name: str = "landsat.tif", bands: Sequence[int] = TRUE_COLOR) -> Scene:
    """Read three bands, each stretched from its 2nd to its 98th percentile."""
    import rasterio

    with rasterio.open(data_path(name)) as raster:
        values = raster.read(list(bands)).astype(np.float32)
        crs = raster.crs.to_string()
        inverse = tuple(~raster.transform)[:6]
    valid = values.max(axis=0) > 0
    low, high = np.percentile(values[:, valid], (2, 98), axis=1)
    share = (values - low[:, None, None]) / (high - low)[:, None, None]
    pixels = np.clip(share * 255 + 0.5, 0, 255).astype(np.uint8) * valid
    to_raster = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    return Scene(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)), to_raster, inverse)


@dataclass(frozen=True)
class Places:
    """Centres of tiles, lat[N] and lon[N], north to south in rows."""

    lat: NDArray[np.float64]
    lon: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.lat)

    def take(self, rows: NDArray[Any]) -> Places:
        return Places(self.lat[rows], self.lon[rows])


def find_places(
    name: str = "landsat.tif",
    *,
    overlap: float = 0.5,
    metres: float = METRES,
    pixels: int = PIXELS,
    least_contrast: float = 8.0,
) -> Places:
    """Return centres of a grid whose turned, shifted squares lie in the scene and show texture.

    least_contrast: standard deviation of the true-colour tile's brightness, of 255.
    """
    bands = TRUE_COLOR if name == "landsat.tif" else FALSE_COLOR
    scene = open_scene(name, bands)
    side = metres * pixels
    lat, lon = _corners(scene)
    reach = 1.25 * side  # half a diagonal, scaled and shifted
    north, west = move(lat[0], lon[0], reach, -reach)[0], move(lat[0], lon[0], reach, 0)[1]
    south, east = move(lat[1], lon[1], 0, reach)[0], move(lat[1], lon[1], -reach, 0)[1]
    found = []
    step = side * (1 - overlap)
    row_lat = north
    while row_lat > south:
        column_lon = west
        while column_lon < east:
            picture = scene.cut(row_lat, column_lon, metres=metres, pixels=pixels)
            wide = scene.cut(row_lat, column_lon, metres=2.2 * side / 16, pixels=16)
            is_whole = wide.max(axis=2).min() > 0 or name == "landsat.tif"
            if is_whole and picture.mean(axis=2).std() >= least_contrast:
                found.append((row_lat, column_lon))
            column_lon = move(row_lat, column_lon, step, 0)[1]
        row_lat = move(row_lat, west, 0, -step)[0]
    points = np.array(found)
    return Places(points[:, 0], points[:, 1])


def _corners(scene: Scene) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return lat[2], lon[2] of the north-west and the south-east corner."""
    height, width = scene.pixels.shape[:2]
    forward = np.linalg.inv(np.array([*scene.inverse, 0, 0, 1]).reshape(3, 3))
    x, y, _ = forward @ np.array([[0, width], [0, height], [1, 1]])
    lon, lat = scene.to_raster.transform(x, y, direction="INVERSE")
    return np.asarray(lat), np.asarray(lon)


@dataclass(frozen=True)
class Query:
    """A picture that was turned, shifted and scaled, and its truth."""

    picture: Picture
    lat: float
    lon: float
    turn_deg: float
    scale: float


def cut_query(scene: Scene, lat: float, lon: float, rng: np.random.Generator) -> Query:
    """Cut a query about a place: any angle, shifted by up to 8 pixels, scaled by 0.85..1.18."""
    east, north = rng.uniform(-8, 8, 2) * METRES
    turn = float(rng.uniform(0, 360))
    scale = float(rng.uniform(0.85, 1.18))
    true_lat, true_lon = move(lat, lon, east, north)
    picture = scene.cut(true_lat, true_lon, turn_deg=turn, metres=METRES * scale)
    return Query(picture, float(true_lat), float(true_lon), turn, scale)
