from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s4g_ray.datasets import cvact, cvusa, university1652, vigor
from s4g_ray.datasets.published import cvcities, denseuav, sues200
from s4g_ray.errors import InputError
from tests.support import drone_trees, source_trees
from tests.support.drone_trees import cities_tree

Tree = Callable[[Path], Path]
CITIES = {"paris": [(48.85, 2.35)], "london": [(51.5, -0.12)]}
SETS: dict[str, tuple[Tree, Callable[..., Any], dict[str, Any], str]] = {
    # how to write it, its converter and options, a folder of it that is too deep
    "cvusa": (source_trees.cvusa_tree, cvusa.convert, {}, "streetview/panos"),
    "cvact": (source_trees.cvact_tree, cvact.convert, {}, "ANU_data_small"),
    "vigor": (source_trees.vigor_tree, vigor.convert, {}, "splits/Chicago"),
    "university1652": (source_trees.university_tree, university1652.convert, {}, "train/drone"),
    "sues200": (drone_trees.sues_archive, sues200.convert, {}, "satellite-view"),
    "denseuav": (drone_trees.dense_tree, denseuav.convert, {}, "test"),
    "cvcities": (
        lambda root: cities_tree(root, CITIES),
        cvcities.convert,
        {"train_cities": "paris", "test_cities": "london"},
        "paris",
    ),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("place", ["exact", "one above", "two above", "too deep"])
def test_a_data_set_is_found_by_its_landmarks(tmp_path: Path, name: str, place: str) -> None:
    write, convert, options, deep = SETS[name]
    root = write(tmp_path / "outer" / "middle" / "Renamed-Release v2")
    (tmp_path / "outer/middle/__MACOSX").mkdir()
    given = {
        "exact": root,
        "one above": root.parent,
        "two above": root.parent.parent,
        "too deep": root / deep,
    }[place]
    notes: list[str] = []
    dataset = convert(str(given), str(tmp_path / "target"), report=notes.append, **options)
    moved = f"the data set lies in {root}, not in {given}: converted from there"
    assert notes == ([] if place == "exact" else [moved])
    for (uri,) in source_trees.rows(dataset, "references", "uri"):
        assert Path(uri).is_file()
        assert Path(uri).is_relative_to(root)


@pytest.mark.parametrize("name", ["cvusa", "university1652", "sues200"])
def test_several_data_sets_are_named_and_none_is_chosen(tmp_path: Path, name: str) -> None:
    write, convert, options, _ = SETS[name]
    for copy in ("a", "b"):
        write(tmp_path / "source" / copy)
    with pytest.raises(InputError, match=r"holds several data sets: .*/a, .*/b; name one"):
        convert(str(tmp_path / "source"), str(tmp_path / "target"), **options)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("name", "moves", "wanted"),
    [
        (
            "university1652",
            {"test/query_drone": "test/drone-query"},
            "test/query_drone is there as drone-query",
        ),
        ("university1652", {"train": "Train"}, "train is there as Train"),
        (
            "university1652",
            {"test/gallery_satellite": "test/gallery satelite"},
            "test/gallery_satellite is there as gallery satelite",
        ),
        ("cvusa", {"streetview": "street_view"}, "streetview is there as street_view"),
        ("cvact", {"ACT_data.mat": "ACT-data.mat"}, "ACT_data.mat is there as ACT-data.mat"),
        ("vigor", {"Chicago": "chicago"}, "Chicago is there as chicago"),
        ("sues200", {"drone_view_512": "drone-view_512"}, "is there as drone-view_512"),
    ],
)
def test_renamed_folders_are_named(
    tmp_path: Path, name: str, moves: dict[str, str], wanted: str
) -> None:
    write, convert, options, _ = SETS[name]
    root = write(tmp_path / "source")
    for old, new in moves.items():
        (root / old).rename(root / new)
    with pytest.raises(InputError) as caught:
        convert(str(root), str(tmp_path / "target"), **options)
    assert wanted in str(caught.value)
    assert "has no known layout" in str(caught.value)


def test_a_folder_of_many_images_is_not_searched(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number:04d}").mkdir()
    with pytest.raises(InputError, match="has no known layout"):
        cvusa.convert(str(folder), str(tmp_path / "target"))
