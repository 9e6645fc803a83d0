from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s4g_ray.datasets.published import cvcities
from s4g_ray.errors import InputError
from tests.support.drone_trees import cities_tree
from tests.support.source_trees import rows, write_lines

CITIES = {"paris": [(48.85, 2.35), (48.86, 2.30)], "london": [(51.5, -0.12)]}
OPTIONS: dict[str, Any] = {"train_cities": "paris", "test_cities": "london"}


def test_a_folder_converts_value_by_value(tmp_path: Path) -> None:
    source = cities_tree(tmp_path / "source", CITIES)
    notes: list[str] = []
    dataset = cvcities.convert(
        str(source), str(tmp_path / "target"), report=notes.append, **OPTIONS
    )
    assert (dataset.name, notes) == ("cvcities", [])
    common = [
        (0, 0, "train", "paris", "paris_0", 48.85, 2.35),
        (1, 1, "train", "paris", "paris_1", 48.86, 2.30),
        (2, 2, "test", "london", "london_0", 51.5, -0.12),
    ]
    columns = ("id", "place_id", "split", "region", "source_id", "lat", "lon")
    assert rows(dataset, "references", *columns) == common
    assert rows(dataset, "queries", *columns) == common
    assert [Path(uri).name for (uri,) in rows(dataset, "references", "uri")] == [
        "0_sat.jpg",
        "0_sat.jpg",
        "1_sat.jpg",
    ]
    assert {heading for _, heading in rows(dataset, "queries", "id", "heading_deg")} == {None}


def test_the_published_cities_are_sixteen_with_known_centres() -> None:
    named = [*cvcities.TRAIN_CITIES.split(","), *cvcities.TEST_CITIES.split(",")]
    assert len(named) == 16
    assert set(named) == set(cvcities.CENTRES)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("p,48.85,2.35,paris,a,b", "is not in paris; longitude and latitude are swapped"),
        ("p,2.35,40.0,paris,a,b", "is not in paris; restore the list"),
        ("p,x,48.85,paris,a,b", "is no longitude and latitude"),
        ("p,2.35,48.85,paris,a", "has 5 columns, but needs 6"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, row: str, message: str) -> None:
    source = cities_tree(tmp_path / "source", CITIES)
    write_lines(source / "paris/img_info.csv", [row])
    with pytest.raises(InputError, match=rf"img_info\.csv, line 1.*{message}"):
        cvcities.convert(str(source), str(tmp_path / "target"), **OPTIONS)


def test_windows_paths_and_missing_images(tmp_path: Path) -> None:
    source = cities_tree(tmp_path / "source", CITIES)
    path = source / "paris/img_info.csv"
    lines = path.read_text().replace("paris/sat/", ".\\paris\\sat\\").splitlines()
    write_lines(path, [*lines, "p,2.35,48.85,paris,paris/sat/none.jpg,paris/pano/0_pano.jpg"])
    notes: list[str] = []
    dataset = cvcities.convert(
        str(source), str(tmp_path / "target"), report=notes.append, **OPTIONS
    )
    assert notes == [
        "missing images: 1, left out with their rows: paris/sat/none.jpg",
        "pairs left out for a missing image: 1",
    ]
    assert [row[0] for row in rows(dataset, "queries", "id")] == [0, 1, 3]


def test_a_part_of_the_cities_names_the_options(tmp_path: Path) -> None:
    source = cities_tree(tmp_path / "source", CITIES)
    with pytest.raises(InputError, match="give --train-cities and --test-cities"):
        cvcities.convert(str(source), str(tmp_path / "target"))
