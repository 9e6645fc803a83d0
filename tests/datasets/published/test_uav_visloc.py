from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s4g_ray.datasets.published import uav_visloc
from s4g_ray.errors import InputError
from tests.support.drone_trees import visloc_tiles, visloc_tree
from tests.support.source_trees import rows

FLIGHTS = {
    "01": [(29.75, 115.98), (29.7513, 115.98)],
    "02": [(29.80, 116.04)],
    "07": [(40.34, 115.792)],
}
# tiles of 200 m: two side by side around the first photo, one for the second flight
CENTRES = [(29.75, 115.98), (29.7508, 115.98), (29.8001, 116.04), (29.9, 116.04)]
OPTIONS: dict[str, Any] = {"train_flights": "01", "test_flights": "02"}


def test_photos_are_paired_with_the_tiles_that_hold_them(tmp_path: Path) -> None:
    source = visloc_tree(tmp_path / "source", FLIGHTS)
    tiles = visloc_tiles(tmp_path / "tiles", CENTRES, 200.0)
    notes: list[str] = []
    dataset = uav_visloc.convert(
        str(source), str(tmp_path / "target"), tiles=tiles.uri, report=notes.append, **OPTIONS
    )
    distances = "11 m (median), 95 % within 51 m, the farthest 56 m"
    assert (dataset.name, notes) == ("uav_visloc", [f"queries from their tiles: {distances}"])
    queries = rows(dataset, "queries", "place_id", "split", "region", "lat", "lon")
    assert queries == [
        (100, "train", "01", 29.75, 115.98),
        (101, "train", "01", 29.7513, 115.98),
        (102, "test", "02", 29.80, 116.04),
    ]
    assert rows(dataset, "queries", "place_id", "semi_positives") == [
        (100, [101]),
        (101, None),
        (102, None),
    ]
    assert rows(dataset, "references", "id", "split", "size_m") == [
        (100, "train", 200.0),
        (101, "train", 200.0),
        (102, "test", 200.0),
        (103, "gallery", 200.0),
    ]
    for (uri,) in rows(dataset, "queries", "uri"):
        assert Path(uri).is_file()


def test_a_flight_with_six_columns_is_read(tmp_path: Path) -> None:
    source = visloc_tree(tmp_path / "source", FLIGHTS)
    tiles = visloc_tiles(tmp_path / "tiles", [FLIGHTS["07"][0], CENTRES[0]], 200.0)
    dataset = uav_visloc.convert(
        str(source),
        str(tmp_path / "target"),
        tiles=tiles.uri,
        train_flights="07",
        test_flights="01",
    )
    assert dataset.count_splits("queries") == {"train": 1, "test": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": None}, r"s4g convert imagery .*satellite\*\.tif"),
        ({"train_flights": "01,02"}, "flight '02' is listed twice"),
        ({"train_flights": "", "test_flights": ""}, "name no flight"),
        ({"test_flights": "03"}, r"lacks 03/03\.csv"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = visloc_tree(tmp_path / "source", FLIGHTS)
    given: dict[str, Any] = {"tiles": str(tmp_path / "tiles"), **OPTIONS, **options}
    with pytest.raises(InputError, match=message):
        uav_visloc.convert(str(source), str(tmp_path / "target"), **given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num,filename\n1,a.JPG\n", r"01\.csv lacks the columns lat, lon"),
        ("filename,lat,lon\na.JPG,x,1\n", r"01\.csv, line 2: lat and lon are no numbers"),
        ("filename,lat,lon\na.JPG,95,1\n", r"01\.csv, line 2: 95\.0, 1\.0 is not within"),
    ],
)
def test_malformed_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    source = visloc_tree(tmp_path / "source", FLIGHTS)
    (source / "01/01.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        uav_visloc.convert(
            str(source), str(tmp_path / "target"), tiles=str(tmp_path / "tiles"), **OPTIONS
        )
