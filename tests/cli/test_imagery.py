from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from s4g_ray.cli.areas import read_area
from s4g_ray.cli.convert import convert_app
from s4g_ray.data.area import Area
from s4g_ray.data.dataset import open_dataset
from s4g_ray.errors import InputError
from tests.datasets.imagery.test_convert import NORTH, WEST, write_raster


def run(*arguments: str) -> Result:
    return CliRunner().invoke(convert_app, ["imagery", *arguments])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_raster(tmp_path_factory.mktemp("imagery") / "a.tif")


def test_the_command_cuts_an_area_and_prints_a_summary(source: str, tmp_path: Path) -> None:
    ring = [[WEST, NORTH], [WEST + 0.01, NORTH], [WEST, NORTH - 0.01]]
    area = tmp_path / "area.geojson"
    area.write_text(json.dumps({"type": "Polygon", "coordinates": [[*ring, ring[0]]]}))
    done = run(
        *(source, str(tmp_path / "r"), "--size-m", "120", "--size-m", "60", "--pixels", "32"),
        *("--area", str(area), "--bands", "3,2,1", "--stretch", "0,128", "--json"),
    )
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    dataset = open_dataset(made["uri"])
    assert made["fingerprint"] == dataset.fingerprint
    assert made["summary"]["tiles"] == dataset.references.count_rows()
    assert made["summary"]["stretch"] == "0,128"
    assert made["counts"]["references"] == {"gallery": made["summary"]["tiles"]}
    assert "cells" in done.stderr
    again = run(source, str(tmp_path / "r"), "--size-m", "120")
    assert isinstance(again.exception, InputError)  # run_app shows it, with exit code 2
    assert "holds a data set already" in str(again.exception)


def test_areas_are_in_degrees_and_features_without_geometry_are_left_out(tmp_path: Path) -> None:
    ring = [[WEST, NORTH], [WEST + 0.01, NORTH], [WEST, NORTH - 0.01], [WEST, NORTH]]
    polygon = {"type": "Polygon", "coordinates": [ring]}
    features = [
        {"type": "Feature", "properties": {}, "geometry": geometry} for geometry in (polygon, None)
    ]
    area = tmp_path / "area.geojson"
    for crs, is_known in (("urn:ogc:def:crs:OGC:1.3:CRS84", True), ("EPSG:3067", False)):
        value = {
            "type": "FeatureCollection",
            "crs": {"type": "name", "properties": {"name": crs}},
            "features": features,
        }
        area.write_text(json.dumps(value))
        if is_known:
            assert read_area(str(area)).extent == Area.from_geojson(polygon).extent
        else:
            with pytest.raises(InputError, match=r"are in EPSG:3067, not in degrees.*ogr2ogr"):
                read_area(str(area))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bounds", "1,2,3"], "--bounds 1,2,3 is not west,south,east,north in degrees"),
        (["--bands", "red"], "--bands red is not a list of bands"),
        (["--area", "nowhere.geojson"], "nowhere.geojson is missing"),
        (["--stretch", "wide"], "stretch 'wide' is none of"),
        (["--workers", "-1"], "--workers -1 is below 0"),
    ],
)
def test_options_that_say_nothing_are_refused(
    source: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run(source, str(tmp_path / "r"), "--size-m", "60", *arguments)
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith(message)
    assert not (tmp_path / "r").exists()
