"""Answers as JSON and GeoJSON; shapes on the ground against geodesics and planar areas."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from s4g_ray.data.photos.exif import ExifPosition
from s4g_ray.data.sphere import metres_between
from s4g_ray.gallery.answer import Answer, Candidate
from s4g_ray.gallery.search.ground_shapes import circle_geometry, square_geometry

shapely = pytest.importorskip("shapely")

CANDIDATE = Candidate(7, 47.0, 8.0, 60.0, 0.5, None, None, (7, 9))
PLACES = [(0.0, 0.0), (47.0, 8.0), (-33.0, -179.9999), (70.0, 179.9999), (84.0, -20.0)]


def rings(geometry: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    if geometry["type"] == "Polygon":
        return [np.array(geometry["coordinates"][0])]
    return [np.array(part[0]) for part in geometry["coordinates"]]


@pytest.mark.parametrize(("lat", "lon"), PLACES)
def test_a_square_has_its_size_on_the_ground(lat: float, lon: float) -> None:
    geometry = square_geometry(lat, lon, 400.0)
    shape = shapely.geometry.shape(geometry)
    assert shape.is_valid
    assert (geometry["type"] == "MultiPolygon") == (abs(lon) > 179)
    scale = 111_195.08 * math.cos(math.radians(lat)) * 111_195.08
    assert shape.area * scale == pytest.approx(400.0**2, rel=2e-3)
    for ring in rings(geometry):
        assert (np.abs(ring[:, 0]) <= 180).all()
        assert shapely.LinearRing(ring).is_ccw
    corners = {tuple(corner) for ring in rings(geometry) for corner in ring}
    away = [metres_between(lat, lon, y, x) for x, y in corners if abs(abs(x) - 180) > 1e-9]
    assert max(away) == pytest.approx(200 * math.sqrt(2), rel=1e-4)


@pytest.mark.parametrize(("lat", "lon"), PLACES)
def test_a_circle_keeps_its_radius(lat: float, lon: float) -> None:
    geometry = circle_geometry(lat, lon, 5000.0)
    assert shapely.geometry.shape(geometry).is_valid
    corners = np.concatenate(rings(geometry))
    corners = corners[np.abs(np.abs(corners[:, 0]) - 180) > 1e-9]
    away = metres_between(lat, lon, corners[:, 1], corners[:, 0])
    np.testing.assert_allclose(away, 5000, rtol=1e-4)


def test_a_circle_around_a_pole_reaches_it() -> None:
    shape = shapely.geometry.shape(circle_geometry(89.99, 30.0, 5000.0))
    assert shape.bounds == pytest.approx((-180, 89.945, 180, 90), abs=1e-3)
    assert shape.is_valid
    assert shape.exterior.is_ccw


def test_a_circle_around_the_south_pole_reaches_it() -> None:
    geometry = circle_geometry(-89.99, 170.0, 5000.0)
    shape = shapely.geometry.shape(geometry)
    assert shape.bounds == pytest.approx((-180, -90, 180, -89.945), abs=1e-3)
    assert shape.is_valid
    assert shape.exterior.is_ccw


@pytest.mark.parametrize("lat", [-60.0, -10.0, 3.0, 30.0, 47.0, 80.0])
@pytest.mark.parametrize("lon", [-170.0, 0.0, 8.0])
def test_a_circle_of_a_quarter_earth_holds_its_centre(lat: float, lon: float) -> None:
    shape = shapely.geometry.shape(circle_geometry(lat, lon, 2e7))
    assert shape.contains(shapely.Point(lon, lat))
    assert not shape.contains(shapely.Point((lon + 360) % 360 - 180, -lat))


def test_json_has_the_names_of_the_fields_and_null_for_what_is_unknown() -> None:
    answer = Answer("a.jpg", (CANDIDATE,), lat=47.0, lon=8.0, is_located=True)
    value = json.loads(json.dumps(answer.to_json(), allow_nan=False))
    assert value["candidates"] == [
        {
            "id": 7,
            "lat": 47.0,
            "lon": 8.0,
            "size_m": 60.0,
            "score": 0.5,
            "probability": None,
            "turn_deg": None,
            "cells": [7, 9],
        }
    ]
    assert value["radius_90_m"] is None
    assert value["refined"] is None
    nowhere = Candidate(7, math.nan, math.nan, math.nan, 0.5, 0.1, 90.0, (7,))
    assert nowhere.to_json()["lat"] is None


def test_geojson_shows_tiles_circles_and_points() -> None:
    answer = Answer(
        "a.jpg",
        (CANDIDATE, Candidate(8, 47.0, 8.1, math.nan, 0.4, None, None, (8,))),
        lat=47.001,
        lon=8.001,
        radius_50_m=50.0,
        radius_90_m=200.0,
        is_located=True,
        exif=ExifPosition(47.0, 8.0, 90.0),
    )
    value = answer.to_geojson()
    json.dumps(value, allow_nan=False)
    kinds = [(f["properties"]["role"], f["geometry"]["type"]) for f in value["features"]]
    assert kinds == [
        ("candidate", "Polygon"),
        ("candidate", "Point"),
        ("radius_90", "Polygon"),
        ("radius_50", "Polygon"),
        ("answer", "Point"),
        ("exif", "Point"),
    ]
    tile, circle, point = (value["features"][i] for i in (0, 2, 4))
    assert (tile["properties"]["rank"], tile["properties"]["id"]) == (1, 7)
    assert circle["properties"]["radius_m"] == 200
    assert point["geometry"]["coordinates"] == [8.001, 47.001]
    assert {f["properties"]["photo"] for f in value["features"]} == {"a.jpg"}


def test_geojson_keeps_a_photo_without_a_place() -> None:
    (feature,) = Answer.from_error("a.jpg", "torn").to_geojson()["features"]
    assert feature["geometry"] is None
    assert feature["properties"]["role"] == "answer"
    assert feature["properties"]["reason"] == "the photo cannot be read: torn"
