from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest

from s4g_ray.data.dataset import open_dataset
from s4g_ray.datasets import vigor
from s4g_ray.errors import InputError
from tests.support.source_trees import rows, vigor_panorama, vigor_tile, vigor_tree

CITIES = ["Chicago", "NewYork", "SanFrancisco", "Seattle"]
ORIGIN = {
    "Chicago": (41.88, -87.64),
    "NewYork": (40.73, -73.99),
    "SanFrancisco": (37.78, -122.42),
    "Seattle": (47.61, -122.33),
}
# In each city of the tree: panorama -> its four tiles. City c has six tiles: 6 c .. 6 c + 5.
LABELS = {
    0: [0, 1, 2, 3],
    1: [1, 2, 3, 4],
    2: [2, 3, 4, 5],
    3: [3, 4, 5, 0],
    4: [4, 5, 0, 1],
    5: [0, 1, 2, 3],
}
QUERY = (
    "id",
    "place_id",
    "split",
    "uri",
    "lat",
    "lon",
    "region",
    "source_id",
    "heading_deg",
    "semi_positives",
)
REFERENCE = ("id", "place_id", "split", "uri", "lat", "lon", "region", "source_id")


def wanted_queries(
    source: Path,
    folder: str,
    listed: list[tuple[str, str, list[int]]],
    changed: dict[int, list[int]] | None = None,
) -> list[tuple[Any, ...]]:
    """Return the rows of (split, city, panoramas) in the order of the label files."""
    made: list[tuple[Any, ...]] = []
    for split, city, panoramas in listed:
        lat, lon = ORIGIN[city]
        for number in panoramas:
            name = vigor_panorama(city, number, number % 5)
            tiles = [
                6 * CITIES.index(city) + tile for tile in {**LABELS, **(changed or {})}[number]
            ]
            own_lon = round(lon + 0.0005 * (number % 5) + 1e-6 * number, 6)
            uri = f"{source}/{folder.format(city)}/{name}"
            values = (
                round(lat + 0.0001, 6),
                own_lon,
                city,
                f"{city[:3]}-{number:04d}_aBcDeFgHiJkLm",
                0.0,
                tiles[1:],
            )
            made.append((len(made), tiles[0], split, uri, *values))
    return made


def wanted_references(
    source: Path, folder: str, listed: list[tuple[str, str, list[int]]]
) -> list[tuple[Any, ...]]:
    """Return the rows of (split, city, tiles), sorted by id: train ids come after all 24 tiles."""
    made: list[tuple[Any, ...]] = []
    for split, city, tiles in listed:
        lat, lon = ORIGIN[city]
        for tile in tiles:
            place = 6 * CITIES.index(city) + tile
            name = vigor_tile(city, tile)
            uri = f"{source}/{folder.format(city)}/{name}"
            values = (lat, round(lon + 0.0005 * tile, 10), city, name.removesuffix(".png"))
            row_id = place + 24 if split == "train" else place
            made.append((row_id, place, split, uri, *values))
    return sorted(made)


@pytest.mark.parametrize(
    ("layout", "panoramas", "tiles"),
    [("upstream", "{}/panorama", "{}/satellite"), ("published", "ground/{}", "satellite/{}")],
)
def test_the_same_area_converts_value_by_value(
    tmp_path: Path, layout: Literal["upstream", "published"], panoramas: str, tiles: str
) -> None:
    source = vigor_tree(tmp_path / "source", layout=layout, corrected=False)
    notes: list[str] = []
    dataset = vigor.convert(str(source), str(tmp_path / "target"), strict=True, report=notes.append)
    assert (dataset.name, notes) == ("vigor_same", [])
    train = [("train", city, [0, 2, 4]) for city in CITIES]
    test = [("test", city, [1, 3, 5]) for city in CITIES]
    assert rows(dataset, "queries", *QUERY) == wanted_queries(source, panoramas, train + test)
    gallery = [("test", city, [0, 1, 2, 3, 4, 5]) for city in CITIES]
    assert rows(dataset, "references", *REFERENCE) == wanted_references(
        source, tiles, train + gallery
    )


def test_the_cross_area_trains_in_two_cities_and_tests_in_the_other_two(tmp_path: Path) -> None:
    source = vigor_tree(tmp_path / "source", corrected=False)
    dataset = vigor.convert(str(source), str(tmp_path / "target"), area="cross")
    assert dataset.name == "vigor_cross"
    every = [0, 1, 2, 3, 4, 5]
    listed = [("train", "NewYork", every), ("train", "Seattle", every)]
    listed += [("test", "Chicago", every), ("test", "SanFrancisco", every)]
    assert rows(dataset, "queries", *QUERY) == wanted_queries(source, "{}/panorama", listed)
    positives = [("train", "NewYork", every[:5]), ("train", "Seattle", every[:5])]
    assert rows(dataset, "references", *REFERENCE) == wanted_references(
        source, "{}/satellite", positives + listed[2:]
    )


@pytest.mark.parametrize("folder", ["splits__corrected", "split__corrected"])
@pytest.mark.parametrize("area", ["same", "cross"])
def test_corrected_labels_are_read_on_request(
    tmp_path: Path, folder: str, area: Literal["same", "cross"]
) -> None:
    source = vigor_tree(tmp_path / "source", layout="published")
    (source / "splits__corrected").rename(source / folder)
    for city in CITIES:  # a download of corrected labels has no other label files beside it
        for name in ("same_area_balanced_train", "same_area_balanced_test", "pano_label_balanced"):
            (source / f"splits/{city}/{name}.txt").unlink()
    dataset = vigor.convert(str(source), str(tmp_path / "target"), area=area, labels="corrected")
    assert dataset.name == f"vigor_{area}_corrected"
    listed = [("train", city, [0, 2, 4]) for city in CITIES] + [
        ("test", city, [1, 3, 5]) for city in CITIES
    ]
    if area == "cross":
        listed = [("train", city, list(range(6))) for city in ("NewYork", "Seattle")]
        listed += [("test", city, list(range(6))) for city in ("Chicago", "SanFrancisco")]
    changed = {0: [1, 0, 2, 3]}
    assert rows(dataset, "queries", *QUERY) == wanted_queries(source, "ground/{}", listed, changed)
    with pytest.raises(InputError, match=r"lacks .*splits/Chicago/same_area_balanced_train\.txt"):
        vigor.convert(str(source), str(tmp_path / "none"))


def test_semi_positives_are_unique_and_never_the_positive(tmp_path: Path) -> None:
    source = vigor_tree(tmp_path / "source")
    path = source / "splits/Chicago/same_area_balanced_train.txt"
    tiles = [vigor_tile("Chicago", tile) for tile in (2, 4, 2, 4)]
    name = path.read_text().split()[0]
    path.write_text(" ".join([name, *(f"{tile} 1 2" for tile in tiles)]))
    vigor.convert(str(source), str(tmp_path / "target"))
    dataset = open_dataset(str(tmp_path / "target"))
    assert rows(dataset, "queries", "id", "place_id", "semi_positives")[0] == (0, 2, [4])


def test_a_tile_of_train_and_test_is_two_rows_of_one_place(tmp_path: Path) -> None:
    source = vigor_tree(tmp_path / "source")
    dataset = vigor.convert(str(source), str(tmp_path / "target"))
    both = [row for row in rows(dataset, "references", "id", "place_id", "split") if row[1] == 20]
    assert both == [(20, 20, "test"), (44, 20, "train")]


def test_missing_images_are_left_out_once_and_ids_do_not_change(tmp_path: Path) -> None:
    source = vigor_tree(tmp_path / "source")
    # the positive of train panorama 0 and of test panorama 5
    tile = source / "Chicago/satellite" / vigor_tile("Chicago", 0)
    panorama = source / "Seattle/panorama" / vigor_panorama("Seattle", 1, 1)
    tile.unlink()
    panorama.unlink()
    notes: list[str] = []
    dataset = vigor.convert(str(source), str(tmp_path / "target"), report=notes.append)
    assert [row[0] for row in rows(dataset, "queries", "id")] == [
        n for n in range(24) if n not in (0, 21)
    ]
    places = rows(dataset, "references", "id", "place_id")
    assert (0, 0) not in places
    assert (24, 0) not in places
    assert len(places) == 36 - 2
    missing = f"{tile.relative_to(source)}, {panorama.relative_to(source)}"
    assert notes == [
        f"missing images: 2, left out with their rows: {missing}",
        "train queries left out because their place has no train reference: 1",
        "test queries that evaluation leaves out because their place has no reference: 1",
    ]
    with pytest.raises(InputError, match=re.escape(f"missing images: 2: {missing}")):
        vigor.convert(str(source), str(tmp_path / "strict"), strict=True)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "NewYork/same_area_balanced_test.txt",
            lambda line: line + " 7",
            r"splits/NewYork/same_area_balanced_test\.txt, line 2 has 14 columns, but needs 13 .*:"
            r" 'New-0003_",
        ),
        (
            "Chicago/same_area_balanced_train.txt",
            lambda line: line.replace(vigor_tile("Chicago", 4), "satellite_1.0_2.0.png"),
            r"Chicago/same_area_balanced_train\.txt, line 2: tile 'satellite_1\.0_2\.0\.png' is in"
            r" no satellite_list",
        ),
        (
            "Seattle/same_area_balanced_train.txt",
            lambda line: line.replace(",", ";"),
            r"Seattle/same_area_balanced_train\.txt, line 2: 'Sea-0002_.*' has no position;"
            r" names are ID,LAT,LON",
        ),
        (
            "Seattle/same_area_balanced_train.txt",
            lambda line: line.replace(",47.", ",147."),
            r"line 2: 'Sea-0002_.*' is not within -90\.\.90",
        ),
        (
            "Seattle/satellite_list.txt",
            lambda line: "satellite_47.6.png",
            r"satellite_list\.txt, line 2: 'satellite_47\.6\.png' has no position;"
            r" names are satellite_LAT_LON",
        ),
        (
            "Seattle/satellite_list.txt",
            lambda line: "satellite_47.6_nan.png",
            r"satellite_list\.txt, line 2: 'satellite_47\.6_nan\.png' is not within",
        ),
        (
            "Seattle/satellite_list.txt",
            lambda line: vigor_tile("Seattle", 0),
            r"satellite_list\.txt, line 2: tile 'satellite_47\.61.*' is listed twice",
        ),
    ],
)
def test_faulty_rows_are_refused_with_file_line_and_content(
    tmp_path: Path, file: str, change: Any, message: str
) -> None:
    source = vigor_tree(tmp_path / "source")
    lines = (source / "splits" / file).read_text().splitlines()
    lines[1] = change(lines[1])
    (source / "splits" / file).write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        vigor.convert(str(source), str(tmp_path / "target"))


def test_wrong_layouts_and_options_are_refused(tmp_path: Path) -> None:
    source = vigor_tree(tmp_path / "source", layout="published", corrected=False)
    (source / "ground/Seattle").rename(source / "ground/seattle")
    with pytest.raises(InputError) as error:
        vigor.convert(str(source), str(tmp_path / "target"), area="cross")
    lines = str(error.value).splitlines()
    assert lines[0] == f"{source} has no known layout; it holds ground, satellite, splits"
    assert lines[1].startswith("layout 'upstream' needs Chicago/panorama, NewYork/panorama, ")
    assert lines[2].startswith("layout 'published code' needs ground/Chicago, ground/NewYork, ")
    assert lines[3:] == [
        "nearest: 'published code', which lacks ground/Seattle"
        " (ground holds Chicago, NewYork, SanFrancisco, seattle)",
        "likely renamed: ground/Seattle is there as seattle; give them the names that are needed",
    ]
    (source / "ground/seattle").rename(source / "ground/Seattle")
    with pytest.raises(InputError) as error:
        vigor.convert(str(source), str(tmp_path / "target"), labels="corrected")
    assert "needs splits__corrected/Chicago/same_area_balanced_train__corrected.txt, " in str(
        error.value
    )
    assert str(error.value).endswith("give --labels original for the others")
    wrong: Any = "both"
    with pytest.raises(InputError, match="--area 'both' is none of same, cross"):
        vigor.convert(str(source), str(tmp_path / "target"), area=wrong)
    with pytest.raises(InputError, match="--labels 'both' is none of original, corrected"):
        vigor.convert(str(source), str(tmp_path / "target"), labels=wrong)
