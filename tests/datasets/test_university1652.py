from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s4g_ray.datasets import university1652
from s4g_ray.errors import InputError
from tests.support.source_trees import rows, university_tree

COLUMNS = ("id", "place_id", "split", "source_id", "region")
# Buildings of the tree: 1 3 5 7 are train, 2 and 4 test, 1000 is a distractor of the galleries.
SATELLITES = [
    (0, 1, "train", "train/satellite/0001/0001.jpg", None),
    (1, 3, "train", "train/satellite/0003/0003.jpg", None),
    (2, 5, "train", "train/satellite/0005/0005.jpg", None),
    (3, 7, "train", "train/satellite/0007/0007.jpg", None),
    (4, 2, "test", "test/gallery_satellite/0002/0002.jpg", None),
    (5, 4, "test", "test/gallery_satellite/0004/0004.jpg", None),
    (6, 1000, "gallery", "test/gallery_satellite/1000/1000.jpg", None),
]


def number_rows(entries: list[tuple[int, str, str, str | None]]) -> list[tuple[Any, ...]]:
    return [(number, *entry) for number, entry in enumerate(entries)]


def test_drone_to_satellite_converts_value_by_value(tmp_path: Path) -> None:
    source = university_tree(tmp_path / "source", drones=2)
    notes: list[str] = []
    dataset = university1652.convert(
        str(source), str(tmp_path / "target"), strict=True, report=notes.append
    )
    assert (dataset.name, notes) == ("university1652_drone_to_satellite", [])
    assert dataset.views == {"references": "satellite image", "queries": "drone image"}
    assert rows(dataset, "references", *COLUMNS) == SATELLITES
    folders = [("train/drone", 1), ("train/drone", 3), ("train/drone", 5), ("train/drone", 7)]
    folders += [("test/query_drone", 2), ("test/query_drone", 4)]
    wanted = number_rows(
        [
            (
                building,
                folder.split("/")[0],
                f"{folder}/{building:04d}/image-{image:02d}.jpeg",
                None,
            )
            for folder, building in folders
            for image in (1, 2)
        ]
    )
    assert rows(dataset, "queries", *COLUMNS) == wanted
    for view in ("references", "queries"):
        for uri, source_id, lat, lon in rows(dataset, view, "uri", "source_id", "lat", "lon"):
            assert (uri, lat, lon) == (f"{source}/{source_id}", None, None)
            assert Path(uri).is_file()
    assert set(rows(dataset, "queries", "heading_deg", "semi_positives")) == {(None, None)}


def test_satellite_to_drone_is_the_other_direction(tmp_path: Path) -> None:
    source = university_tree(tmp_path / "source", train=1, test=1, drones=2)
    dataset = university1652.convert(
        str(source), str(tmp_path / "target"), query_view="satellite", reference_view="drone"
    )
    assert dataset.name == "university1652_satellite_to_drone"
    assert rows(dataset, "queries", *COLUMNS) == [
        (0, 1, "train", "train/satellite/0001/0001.jpg", None),
        (1, 2, "test", "test/query_satellite/0002/0002.jpg", None),
    ]
    assert rows(dataset, "references", *COLUMNS) == [
        (0, 1, "train", "train/drone/0001/image-01.jpeg", None),
        (1, 1, "train", "train/drone/0001/image-02.jpeg", None),
        (2, 2, "test", "test/gallery_drone/0002/image-01.jpeg", None),
        (3, 2, "test", "test/gallery_drone/0002/image-02.jpeg", None),
        (4, 1000, "gallery", "test/gallery_drone/1000/image-01.jpeg", None),
        (5, 1000, "gallery", "test/gallery_drone/1000/image-02.jpeg", None),
    ]


def test_joined_views_are_named_in_region_and_google_has_train_images_only(
    tmp_path: Path,
) -> None:
    source = university_tree(tmp_path / "source", train=1, test=1, streets=1)
    (source / "test/gallery_street").rename(source / "test/unused")
    dataset = university1652.convert(
        str(source), str(tmp_path / "target"), query_view="street, google"
    )
    assert dataset.name == "university1652_street+google_to_satellite"
    assert dataset.views["queries"] == "street photo or web-search photo"
    assert rows(dataset, "queries", *COLUMNS) == [
        (0, 1, "train", "train/street/0001/1.jpg", "street"),
        (1, 1, "train", "train/google/0001/1.jpg", "google"),
        (2, 2, "test", "test/query_street/0002/1.jpg", "street"),
    ]
    assert rows(dataset, "references", "id", "region") == [(0, None), (1, None), (2, None)]


def test_extensions_in_any_case_are_images_and_other_files_are_counted(tmp_path: Path) -> None:
    source = university_tree(tmp_path / "source", train=1, test=1, drones=1)
    folder = source / "train/drone/0001"
    for name in ("b.JPG", "a.Png", "c.WEBP", ".hidden.jpg", "Thumbs.db", "d.txt"):
        (folder / name).touch()
    (source / "train/drone/.DS_Store").touch()
    notes: list[str] = []
    dataset = university1652.convert(str(source), str(tmp_path / "target"), report=notes.append)
    names = [
        source_id.rpartition("/")[2] for _, source_id in rows(dataset, "queries", "id", "source_id")
    ]
    assert names == ["a.Png", "b.JPG", "c.WEBP", "image-01.jpeg", "image-01.jpeg"]
    assert notes == [
        "files left out that are not .jpg, .jpeg, .png, .webp: 2:"
        " train/drone/0001/Thumbs.db, train/drone/0001/d.txt"
    ]


def test_queries_without_a_reference_of_their_building_are_counted(tmp_path: Path) -> None:
    source = university_tree(tmp_path / "source", drones=3)
    for folder in ("train/satellite/0003/0003.jpg", "test/gallery_satellite/0004/0004.jpg"):
        (source / folder).unlink()
    notes: list[str] = []
    dataset = university1652.convert(str(source), str(tmp_path / "target"), report=notes.append)
    assert {place for (place,) in rows(dataset, "queries", "place_id")} == {1, 5, 7, 2, 4}
    assert notes == [
        "train queries left out because their place has no train reference: 3",
        "test queries that evaluation leaves out because their place has no reference: 3",
    ]


def test_wrong_layouts_and_views_are_refused(tmp_path: Path) -> None:
    source = university_tree(tmp_path / "source", train=1, test=1, drones=1, streets=1)
    target = str(tmp_path / "target")
    (source / "train/google").rename(source / "train/Google")
    with pytest.raises(InputError) as error:
        university1652.convert(str(source), target, query_view="street,google")
    assert str(error.value).splitlines() == [
        f"{source} has no known layout; it holds test, train",
        "layout 'University-1652' needs train/street, train/google, test/query_street,"
        " train/satellite, test/gallery_satellite",
        "nearest: 'University-1652', which lacks train/google"
        " (train holds Google, drone, satellite, street)",
        "likely renamed: train/google is there as Google; give them the names that are needed",
    ]
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"query_view": "dron"},
            "--query-view 'dron': 'dron' is none of drone, satellite, street, google",
        ),
        ({"reference_view": ""}, "--reference-view '': '' is none of"),
        ({"query_view": "google"}, "has no test images; join it with another view"),
        ({"query_view": "drone,satellite"}, "satellite is in --query-view and in --reference-view"),
    ]
    for views, message in wrong:
        with pytest.raises(InputError, match=message):
            university1652.convert(str(source), target, **views)
    (source / "train/drone/__MACOSX").mkdir()
    with pytest.raises(
        InputError, match="train/drone holds '__MACOSX', which is not a building's number"
    ):
        university1652.convert(str(source), target)
