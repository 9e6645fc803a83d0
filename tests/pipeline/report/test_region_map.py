from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.sphere import METRES_A_DEGREE, metres_between
from s4g_ray.pipeline.report import tile_mosaic
from s4g_ray.pipeline.report.map_frame import MapFrame, format_degrees, round_down, split_areas
from s4g_ray.pipeline.report.page import EvaluatedRun, read_results
from s4g_ray.pipeline.report.region_map import choose_areas, draw_maps, great_circle
from s4g_ray.pipeline.report.tile_mosaic import draw_mosaic
from tests.support.evaluated_runs import (
    GRID,
    NORTH_WEST,
    SIZE_M,
    tile_color,
    write_ground,
    write_run,
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_ground(tmp_path_factory.mktemp("ground") / "data")


def test_great_circles_take_the_short_way_and_break_opposite_of_the_middle() -> None:
    lat, lon = great_circle((10.0, 170.0), (10.0, -170.0))
    assert np.isnan(lat).sum() == 1
    assert np.nanmin(np.abs(lon)) > 169
    lat, _ = great_circle((10.0, 170.0), (10.0, -170.0), middle=180.0)
    assert np.isfinite(lat).all()
    lat, lon = great_circle((0.0, 10.0), (0.0, 20.0))
    np.testing.assert_allclose(lat, 0, atol=1e-9)
    assert (np.diff(lon) > 0).all()


@pytest.mark.parametrize("lon", [12.0, 179.98, -179.99])
@pytest.mark.parametrize("lat", [-47.0, 0.0, 64.0])
def test_a_frame_holds_its_points_and_measures_metres_across_the_antimeridian(
    lat: float, lon: float
) -> None:
    rng = np.random.default_rng(1)
    lats = lat + rng.uniform(-0.05, 0.05, 40)
    lons = (lon + rng.uniform(-0.05, 0.05, 40) + 180) % 360 - 180
    frame = MapFrame.around(lats, lons)
    assert frame.contains(lats, lons).all()
    assert 2 * frame.half_width_m < 40_000
    x, y = frame.to_plane(lats, lons)
    straight = np.hypot(x[1:] - x[0], y[1:] - y[0])
    metres = metres_between(lats[1:], lons[1:], lats[0], lons[0])
    np.testing.assert_allclose(straight, metres, rtol=0.003)
    meridians, step = frame.meridians()
    assert 3 <= len(meridians) <= 12
    assert frame.contains(np.full(len(meridians), frame.lat), meridians).all()
    np.testing.assert_allclose(meridians / step, np.rint(meridians / step), atol=1e-6)


def test_a_frame_beside_a_pole_measures_metres() -> None:
    lat = np.array([88.9, 88.9])
    frame = MapFrame.around(np.append(lat, 89.0), np.array([10.0, 10.5, 10.0]))
    x, _ = frame.to_plane(lat, np.array([10.0, 10.5]))
    wanted = metres_between(88.95, 10.0, 88.95, 10.5)
    np.testing.assert_allclose(x[1] - x[0], wanted, rtol=1e-4)


def test_the_graticule_of_the_world_is_in_steps_that_people_use() -> None:
    lats = np.array([-60.0, 60.0])
    frame = MapFrame.around(lats, np.array([-170.0, 60.0]))
    assert frame.meridians()[1] in (10, 15, 30, 45)
    assert [round_down(value) for value in (999.0, 1000.0, 0.049, 5.0)] == [500, 1000, 0.02, 5]
    assert format_degrees(-112.06, 0.02, "EW") == "112.06° W"
    assert format_degrees(30.0, 15, "NS") == "30° N"
    assert format_degrees(-180.0, 30, "EW") == "180°"
    assert format_degrees(0.0, 30, "EW") == "0°"


def test_cities_far_apart_are_areas_and_a_scattered_region_is_one() -> None:
    rng = np.random.default_rng(0)
    cities = {"Chicago": (41.9, -87.6), "Oakland": (37.8, -122.2), "San Francisco": (37.8, -122.5)}
    lat = np.concatenate([city[0] + rng.uniform(-0.03, 0.03, 200) for city in cities.values()])
    lon = np.concatenate([city[1] + rng.uniform(-0.03, 0.03, 200) for city in cities.values()])
    areas = split_areas(lat, lon)
    assert sorted(rows.tolist() for rows in areas) == [
        list(range(200)),
        list(range(200, 400)),
        list(range(400, 600)),
    ]
    across = (rng.uniform(179.5, 180.5, 300) + 180) % 360 - 180
    (one,) = split_areas(rng.uniform(40, 41, 300), across)
    assert len(one) == 300
    assert [rows.tolist() for rows in split_areas(np.full(3, 5.0), np.full(3, 6.0))] == [[0, 1, 2]]


def test_scattered_queries_share_one_map_and_cities_get_their_own() -> None:
    rng = np.random.default_rng(5)
    scattered = choose_areas(rng.uniform(-60, 60, 24), rng.uniform(-180, 180, 24))
    assert [rows.tolist() for rows in scattered] == [list(range(24))]
    lat = np.concatenate([rng.uniform(40.7, 40.8, 50), rng.uniform(47.5, 47.7, 30), [10.0]])
    lon = np.concatenate([rng.uniform(-74, -73.9, 50), rng.uniform(-122.4, -122.2, 30), [20.0]])
    shown = choose_areas(lat, lon)
    assert [sorted(rows.tolist()) for rows in shown] == [
        list(range(81)),
        list(range(50)),
        list(range(50, 80)),
    ]


def middle_pixels(frame: MapFrame, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """The pixel at the middle of each tile of the ground, by place."""
    step = SIZE_M / METRES_A_DEGREE
    found = []
    for place in range(GRID * GRID):
        row, column = divmod(place, GRID)
        lat = NORTH_WEST[0] - (row + 0.5) * step
        lon = NORTH_WEST[1] + (column + 0.5) * step / np.cos(np.radians(NORTH_WEST[0]))
        x, y = frame.to_plane(np.array(lat), np.array(lon))
        scale = shape[1] / (2 * frame.half_width_m)
        found.append(
            (int((frame.half_height_m - y) * scale), int((x + frame.half_width_m) * scale))
        )
    return found


@pytest.mark.parametrize("most", [1500, 20])
def test_each_tile_lies_where_its_ground_is(
    ground: GeoDataset, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """With fewer tiles than it takes, cells show the mean colors of those nearest to them."""
    monkeypatch.setattr(tile_mosaic, "MAX_TILES", most)
    table = ground.table("references", ["test"])
    frame = replace(MapFrame.around(table.lat, table.lon), half_width_m=400.0)
    shape = (round(300 * frame.aspect), 300)
    canvas = draw_mosaic(frame, table, np.full(len(table), SIZE_M), shape)
    colors = np.array([canvas[pixel] for pixel in middle_pixels(frame, shape)]).astype(int)
    wanted = np.array([tile_color(*divmod(place, GRID)) for place in range(GRID * GRID)])
    if most == 1500:
        np.testing.assert_array_equal(colors[:, :3], wanted)
        assert (colors[:, 3] == 255).all()
        assert canvas[0, 0, 3] == 0  # beyond the tiles
        rows, columns = np.array(middle_pixels(frame, shape)).T
        inner = canvas[rows.min() : rows.max(), columns.min() : columns.max(), 3]
        assert (inner == 255).all()  # no seam between tiles
    else:
        shown = colors[:, 3] == 255
        assert shown.mean() > 0.8
        assert np.abs(colors[shown, :3] - wanted[shown]).max() <= 50  # two tiles away
    unknown = draw_mosaic(frame, table, np.full(len(table), np.nan), shape)
    assert not unknown.any()


def test_a_map_shows_the_tiles_under_its_marks(ground: GeoDataset, tmp_path: Path) -> None:
    vectors = np.eye(GRID * GRID)
    write_run(tmp_path / "run", ground, queries=np.roll(vectors, 8, axis=0), references=vectors)
    results = read_results(EvaluatedRun.read(str(tmp_path / "run")))
    (drawn,) = draw_maps(results)
    assert "64 of 64 queries" in drawn.caption
    assert "46.00° N, 7.00° E" in drawn.caption
    data = base64.b64decode(drawn.image.partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    table = ground.table("references", ["test"])
    frame = MapFrame.around(table.lat, table.lon)
    scale = pixels.shape[1] / (2 * frame.half_width_m)
    off = int(0.3 * SIZE_M * scale)  # beside marks, which stand at the middles
    near = []
    for place, (row, column) in enumerate(middle_pixels(frame, pixels.shape[:2])):
        gap = np.abs(pixels[row - off, column - off] - tile_color(*divmod(place, GRID))).max()
        near.append(gap < 12)
    assert np.mean(near) > 0.8  # the scale bar and lines hide some
