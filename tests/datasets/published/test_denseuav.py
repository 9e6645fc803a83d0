from __future__ import annotations

from pathlib import Path

import pytest

from s4g_ray.datasets.published import denseuav
from s4g_ray.errors import InputError
from tests.support.drone_trees import dense_position, dense_tree
from tests.support.source_trees import rows, write_lines

COLUMNS = ("id", "place_id", "split", "source_id", "region", "lat", "lon")


def test_drone_to_satellite_converts_value_by_value(tmp_path: Path) -> None:
    source = dense_tree(tmp_path / "source", train=(1,), test=(7,))
    notes: list[str] = []
    dataset = denseuav.convert(str(source), str(tmp_path / "target"), report=notes.append)
    assert (dataset.name, notes) == ("denseuav_drone_to_satellite", [])
    assert rows(dataset, "queries", *COLUMNS) == [
        (0, 1, "train", "train/drone/000001/H80.JPG", "80 m", *dense_position(1)),
        (1, 1, "train", "train/drone/000001/H90.JPG", "90 m", *dense_position(1)),
        (2, 7, "test", "test/query_drone/000007/H80.JPG", "80 m", *dense_position(7)),
        (3, 7, "test", "test/query_drone/000007/H90.JPG", "90 m", *dense_position(7)),
    ]
    names = ("H80.tif", "H80_old.tif", "H90.tif", "H90_old.tif")
    places = [(1, "train", "train/satellite"), (1, "test", "test/gallery_satellite")]
    places.append((7, "test", "test/gallery_satellite"))
    wanted = [
        (place, split, f"{folder}/{place:06d}/{name}", f"{name[1:3]} m", *dense_position(place))
        for place, split, folder in places
        for name in names
    ]
    assert [row[1:] for row in rows(dataset, "references", *COLUMNS)] == wanted


def test_satellite_to_drone_is_the_other_direction(tmp_path: Path) -> None:
    source = dense_tree(tmp_path / "source")
    dataset = denseuav.convert(
        str(source), str(tmp_path / "target"), query_view="satellite", reference_view="drone"
    )
    assert dataset.views == {"references": "drone image", "queries": "satellite image"}
    assert dataset.count_splits("queries") == {"train": 8, "test": 4}
    assert dataset.count_splits("references") == {"train": 4, "test": 6}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/drone/000001/H80.JPG 120.3 30.3 80", "is not .*ELON NLAT HEIGHT"),
        ("H80.JPG E120.3 N30.3 80", "is not .*ELON NLAT HEIGHT"),
        ("train/drone/000001/H80.JPG E30.3 N120.3 80", "not within -90..90"),
    ],
)
def test_malformed_positions_are_refused(tmp_path: Path, line: str, message: str) -> None:
    source = dense_tree(tmp_path / "source")
    write_lines(source / "Dense_GPS_ALL.txt", [line])
    with pytest.raises(InputError, match=rf"Dense_GPS_ALL.txt, line 1: .*{message}"):
        denseuav.convert(str(source), str(tmp_path / "target"))


def test_places_without_a_position_are_counted_or_refused(tmp_path: Path) -> None:
    source = dense_tree(tmp_path / "source")
    lines = (source / "Dense_GPS_ALL.txt").read_text().splitlines()
    write_lines(source / "Dense_GPS_ALL.txt", [line for line in lines if "/000001/" not in line])
    notes: list[str] = []
    dataset = denseuav.convert(str(source), str(tmp_path / "target"), report=notes.append)
    assert notes == [
        "places that Dense_GPS_ALL.txt lacks: 1, the first 1; their coordinates are empty"
    ]
    assert [row[1] for row in rows(dataset, "queries", "id", "lat")[2:4]] == [None, None]
    with pytest.raises(InputError, match="lacks: 1, the first 1; add them"):
        denseuav.convert(str(source), str(tmp_path / "other"), strict=True)
