"""Areas, against slow oracles: distances one by one, and winding of vectors around a point."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.data.area import Area
from s4g_ray.data.sphere import EARTH_RADIUS_M
from s4g_ray.errors import InputError


def points(count: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-90, 90, count), rng.uniform(-180, 180, count)


def metres_by_vectors(lat_a: float, lon_a: float, lat_b: float, lon_b: float) -> float:
    """Return the metres between two points, by the angle between their vectors."""
    vectors = []
    for lat, lon in ((lat_a, lon_a), (lat_b, lon_b)):
        phi = math.radians(lat)
        lam = math.radians(lon)
        xyz = (math.cos(phi) * math.cos(lam), math.cos(phi) * math.sin(lam), math.sin(phi))
        vectors.append(np.array(xyz))
    cross = float(np.linalg.norm(np.cross(vectors[0], vectors[1])))
    return EARTH_RADIUS_M * math.atan2(cross, float(vectors[0] @ vectors[1]))


@pytest.mark.parametrize("lat", [0.0, 51.5, 89.9, -90.0])
@pytest.mark.parametrize("lon", [0.0, 179.99, -180.0])
@pytest.mark.parametrize("radius_m", [0.0, 2_000_000.0, 21_000_000.0])
def test_a_circle_holds_what_is_near(lat: float, lon: float, radius_m: float) -> None:
    lats, lons = points(400)
    lats[:2], lons[:2] = lat, lon + 360
    found = Area.circle(lat, lon, radius_m).contains(lats, lons)
    metres = [metres_by_vectors(lat, lon, a, b) for a, b in zip(lats[2:], lons[2:], strict=True)]
    assert found[2:].tolist() == [m <= radius_m for m in metres]
    assert found[:2].all() or radius_m == 0


def test_bounds_cross_the_antimeridian_where_west_is_east_of_east() -> None:
    area = Area.bounds(170, -20, -170, 10)
    lon = np.array([170.0, 175, 180, -180, -170, 190, -185, 169.9, -169.9, 0])
    assert area.contains(np.zeros(10), lon).tolist() == [True] * 7 + [False] * 3
    assert area.contains([-20, 10, -20.1, 10.1, np.nan], [180] * 5).tolist() == [
        *([True] * 2),
        *([False] * 3),
    ]
    everywhere = Area.bounds(-180, -90, 180, 90)
    assert everywhere.contains(*points(100)).all()


def winding(ring: list[tuple[float, float]], lat: float, lon: float) -> bool:
    """Return whether the corners, lon and lat, turn around a point: the sum of the angles."""
    total = 0.0
    for (ax, ay), (bx, by) in zip(ring, ring[1:] + ring[:1], strict=True):
        a = math.atan2(ay - lat, ax - lon)
        b = math.atan2(by - lat, bx - lon)
        total += (b - a + math.pi) % (2 * math.pi) - math.pi
    return abs(total) > math.pi


def star(rng: np.random.Generator, lon: float, lat: float, size: float) -> Any:
    """Return a ring, lon and lat, around a point, whose corners lie at any distance from it."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    reach = rng.uniform(0.2, 1, 9) * size
    return np.stack([lon + reach * np.cos(angles), lat + reach * np.sin(angles)], 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), lon=st.sampled_from([0.0, 10.0, 175.0, -180.0]))
def test_a_polygon_with_a_hole_holds_what_its_border_winds_around(seed: int, lon: float) -> None:
    rng = np.random.default_rng(seed)
    border = star(rng, lon, 20, 30)
    hole = star(rng, lon, 20, 8)
    lats = rng.uniform(-15, 55, 200)
    lons = lon + rng.uniform(-40, 40, 200)
    wanted = [
        winding([tuple(c) for c in border], a, b) != winding([tuple(c) for c in hole], a, b)
        for a, b in zip(lats, lons, strict=True)
    ]
    wrapped = [ring.copy() for ring in (border, hole)]
    for ring in wrapped:
        ring[:, 0] = (ring[:, 0] + 180) % 360 - 180
    for rings in ([border, hole], wrapped, [border, wrapped[1]]):
        area = Area.polygon(rings)
        for shift in (0, 360, -360):
            assert area.contains(lats, lons + shift).tolist() == wanted


def test_rings_may_go_around_the_earth_but_not_around_a_pole() -> None:
    world = Area.polygon([[[-180, -90], [180, -90], [180, 90], [-180, 90], [-180, -90]]])
    lats, lons = points(300)
    assert world.contains(lats, lons).all()
    cap: list[list[float]] = [[-180, 60], [-90, 60], [0, 60], [90, 60], [180, 60]]
    with pytest.raises(InputError, match="around a pole; cut it at a meridian"):
        Area.polygon([cap[:-1]])
    cut = Area.polygon([np.array([*cap, [180, 90], [-180, 90]])])
    assert (cut.contains(lats, lons) == (lats >= 60)).all()


def test_geojson_gives_the_union_of_its_polygons() -> None:
    ring = [[0, 0, 7.5], [10, 0, 7.5], [10, 10, 7.5], [0, 10, 7.5], [0, 0, 7.5]]
    far = [[[170, 0], [-170, 0], [-170, 10], [170, 10]]]
    single = {"type": "Polygon", "coordinates": [ring]}
    several = {"type": "MultiPolygon", "coordinates": [[ring], far]}
    lat = np.array([5, 5, 5, -1.0])
    lon = np.array([5, 180, 20, 5.0])
    for value, wanted in (
        (single, [True, False, False, False]),
        (several, [True, True, False, False]),
        ({"type": "Feature", "geometry": single, "properties": {}}, [True, False, False, False]),
        (
            {
                "type": "FeatureCollection",
                "features": [
                    {
                        "type": "Feature",
                        "geometry": {"type": "GeometryCollection", "geometries": [several]},
                    }
                ],
            },
            [True, True, False, False],
        ),
    ):
        area = Area.from_geojson(value)
        assert area.contains(lat, lon).tolist() == wanted
        assert pickle.loads(pickle.dumps(area)).contains(lat, lon).tolist() == wanted
    joined = Area.from_geojson(single).union(Area.circle(-1, 5, 10))
    assert joined.contains(lat, lon).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Area.circle(91, 0, 5), "latitude of 91 is not within -90..90"),
        (lambda: Area.circle(0, 0, -1), "radius_m=-1"),
        (lambda: Area.bounds(0, 10, 5, 0), "are not west, south, east, north"),
        (lambda: Area.polygon([]), "needs a ring of at least 3 corners"),
        (lambda: Area.polygon([[[0, 0], [1, 1]]]), "at least 3 corners"),
        (lambda: Area.polygon([[[0, 95], [1, 1], [2, 2]]]), "give lon, then lat"),
        (
            lambda: Area.polygon([np.array([[0, math.nan], [1, 1], [2, 2]])]),
            "finite lon, lat pairs",
        ),
        (lambda: Area.polygon([["a", "b"]]), "list of lon, lat pairs"),
        (lambda: Area.from_geojson({"type": "Point", "coordinates": [0, 0]}), "'Point' is no area"),
        (lambda: Area.from_geojson({"type": "FeatureCollection", "features": []}), "no polygon"),
        (lambda: Area.from_geojson({"type": "Feature"}), "not as RFC 7946 has it"),
    ],
)
def test_what_is_no_area_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_the_extent_is_the_smallest_around_all_shapes() -> None:
    assert Area.bounds(170, -20, -170, 0).extent == pytest.approx((170, -20, 190, 0))
    both = Area.bounds(170, -20, 175, 0).union(Area.bounds(-175, -30, -170, 5))
    assert both.extent == pytest.approx((170, -30, 190, 5))
    apart = Area.bounds(-10, 0, 10, 1).union(Area.bounds(100, 0, 120, 1))
    assert apart.extent == pytest.approx((-10, 0, 120, 1))
    ring = [[179, 1], [-179, 1], [-179, 3], [179, 2]]
    assert Area.polygon([ring]).extent == pytest.approx((179, 1, 181, 3))
    assert Area.bounds(-180, -90, 180, 90).extent == pytest.approx((-180, -90, 180, 90))


@pytest.mark.parametrize("lat", [0.0, 60.0, -85.0, 89.99])
def test_the_extent_of_a_circle_holds_it_closely(lat: float) -> None:
    area = Area.circle(lat, 100, 20_000)
    west, south, east, north = area.extent
    lats, lons = np.meshgrid(
        np.linspace(max(lat - 0.3, -90), min(lat + 0.3, 90), 201), np.linspace(-80, 280, 3601)
    )
    inside = area.contains(lats.ravel(), lons.ravel())
    assert inside.any()
    assert lats.ravel()[inside].min() >= south
    assert lats.ravel()[inside].max() <= north
    assert ((lons.ravel()[inside] - west) % 360 <= east - west).all()
    if lat < 89:
        assert north - south == pytest.approx(2 * 20_000 / 111_194, rel=1e-3)
