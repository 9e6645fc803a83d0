from __future__ import annotations

import io
import json

import numpy as np
import pytest
import shapely
from PIL import Image

from s4g_ray.datasets.imagery.cutting.coverage import (
    Squares,
    draw_map,
    half_sides,
    measure_km2,
    to_geojson,
    union_squares,
)
from s4g_ray.datasets.imagery.world_grid import WorldGrid


@pytest.mark.parametrize(("lat", "lon"), [(0.0, 10.0), (52.3, 179.999), (-71.0, -60.0)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.3])
def test_the_union_holds_just_the_points_that_a_square_holds(
    lat: float, lon: float, overlap: float
) -> None:
    grid = WorldGrid(500.0, overlap)
    cells = grid.cells_in(bounds=(lon - 0.05, lat - 0.02, lon + 0.05, lat + 0.02))
    rng = np.random.default_rng(5)
    cells = cells.take(rng.random(len(cells)) < 0.6)
    union = union_squares(Squares(cells.lat, cells.lon, 500.0))
    lats = rng.uniform(lat - 0.03, lat + 0.03, 4000)
    lons = (rng.uniform(lon - 0.06, lon + 0.06, 4000) + 180) % 360 - 180
    half_lat, half_lon = half_sides(cells.lat, 500.0)
    inside = np.zeros(len(lats), bool)
    for row in range(len(cells)):
        beside = np.abs((lons - cells.lon[row] + 180) % 360 - 180)
        inside |= (np.abs(lats - cells.lat[row]) < half_lat[row]) & (beside < half_lon[row])
    assert 0.2 < inside.mean() < 0.95
    # neighbors of a row that differ by less than a millionth of their width count as touching
    assert (shapely.contains_xy(union, lons, lats) != inside).sum() <= 1
    west, _, east, _ = shapely.bounds(union)
    assert west >= -180
    assert east <= 180


def test_a_square_has_its_size_on_the_ellipsoid() -> None:
    pyproj = pytest.importorskip("pyproj")
    geod = pyproj.Geod(ellps="WGS84")
    for lat in (0.0, 45.0, -70.0):
        one = union_squares(Squares(np.array([lat]), np.array([10.0]), 1000.0))
        west, south, east, north = shapely.bounds(one)
        assert geod.inv(west, lat, east, lat)[2] == pytest.approx(1000, rel=1e-5)
        assert geod.inv(10, south, 10, north)[2] == pytest.approx(1000, rel=1e-5)
        assert measure_km2(one) == pytest.approx(1.0, rel=1e-4)


def test_the_area_is_that_of_the_ellipsoid() -> None:
    # the surface of WGS 84: 510,065,621.724 km2
    assert measure_km2(shapely.box(-180, -90, 180, 90)) == pytest.approx(510_065_621.724, rel=1e-9)
    half = shapely.box(0, 0, 90, 90)
    assert measure_km2(half) == pytest.approx(510_065_621.724 / 8, rel=1e-9)


def test_geojson_and_map_show_each_size() -> None:
    lat = np.array([10.0, 10.0, 10.1])
    lon = np.array([179.99, -179.99, 179.9])
    kept = {size: union_squares(Squares(lat, lon, size)) for size in (500.0, 2000.0)}
    collection = to_geojson(kept, {500.0: 3, 2000.0: 2})
    assert [feature["properties"]["tiles"] for feature in collection["features"]] == [3, 2]
    again = shapely.from_geojson(json.dumps(collection["features"][0]["geometry"]))
    assert shapely.equals(again, kept[500.0])
    nothing = shapely.MultiPolygon()
    png = draw_map(kept, nothing, shapely.box(179, 9, 180, 11), {500.0: 3, 2000.0: 2}, "a $b")
    assert png == draw_map(
        kept, nothing, shapely.box(179, 9, 180, 11), {500.0: 3, 2000.0: 2}, "a $b"
    )
    assert Image.open(io.BytesIO(png)).format == "PNG"
