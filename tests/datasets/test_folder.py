from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets import folder
from s4g_ray.datasets.lists.pairing import choose_eastern_strip
from s4g_ray.errors import InputError
from tests.support.source_trees import rows

# tiles a few kilometres apart across the antimeridian, and photos beside them
TILES = [
    "path,lat,lon",
    "t/a.png,-17.0,179.99",
    "t/b.png,-17.0,-179.99",
    "t/c.png,-17.0,179.5",
    "t/d.png,-17.1,179.5",
]
PHOTOS = [
    "path,lat,lon",
    "p/0.jpg,-17.0,-179.999",
    "p/1.jpg,-17.0,179.999",
    "p/2.jpg,-17.06,179.5",
    "p/3.jpg,-17,179",
]
KEYS = [
    "path,lat,lon,key",
    "t/a.png,1,2,north",
    "t/b.png,3,4,south",
    "t/c.png,,,north",
    "t/d.png,5,6,unused",
]
KEYED = [
    "path,key,lat,lon",
    "p/0.jpg,south,,",
    "p/1.jpg,north,1.5,2.5",
    "p/2.jpg,north,,",
    "p/3.jpg,elsewhere,,",
]


def make(root: Path, references: list[str], queries: list[str], images: bool = True) -> str:
    """Write a folder with the two CSV files, and an empty file for each image that they name."""
    for name, lines in (("references", references), ("queries", queries)):
        root.mkdir(exist_ok=True)
        (root / f"{name}.csv").write_text("\n".join(lines))
        for line in lines[1:] if images else []:
            path = root / line.split(",")[0].strip()
            path.parent.mkdir(exist_ok=True, parents=True)
            path.touch()
    return str(root)


def test_each_query_goes_to_the_nearest_tile_across_the_antimeridian(tmp_path: Path) -> None:
    source = make(tmp_path / "islands", TILES, PHOTOS)
    notes: list[str] = []
    dataset = folder.convert(
        source, str(tmp_path / "target"), test_fraction=0.5, strict=True, report=notes.append
    )
    distances = "2,702 m (median), 95 % within 46 km, the farthest 53 km"
    assert (dataset.name, notes) == ("islands", [f"queries from their tiles: {distances}"])
    # the easternmost half of the ground: a, and b across the antimeridian
    columns = ("id", "place_id", "uri", "split", "lat", "lon", "region", "source_id")
    assert rows(dataset, "references", *columns) == [
        (0, 0, f"{source}/t/a.png", "test", -17.0, 179.99, None, "t/a.png"),
        (1, 1, f"{source}/t/b.png", "test", -17.0, -179.99, None, "t/b.png"),
        (2, 2, f"{source}/t/c.png", "train", -17.0, 179.5, None, "t/c.png"),
        (3, 3, f"{source}/t/d.png", "train", -17.1, 179.5, None, "t/d.png"),
    ]
    assert rows(dataset, "queries", *columns, "heading_deg", "semi_positives") == [
        (0, 1, f"{source}/p/0.jpg", "test", -17.0, -179.999, None, "p/0.jpg", None, None),
        (1, 0, f"{source}/p/1.jpg", "test", -17.0, 179.999, None, "p/1.jpg", None, None),
        (2, 3, f"{source}/p/2.jpg", "train", -17.06, 179.5, None, "p/2.jpg", None, None),
        (3, 2, f"{source}/p/3.jpg", "train", -17.0, 179.0, None, "p/3.jpg", None, None),
    ]


def test_nearest_agrees_with_a_search_over_all_distances(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    at = {
        "t": rng.uniform((-89, -180), (89, 180), (40, 2)),
        "p": rng.uniform((-89, -180), (89, 180), (60, 2)),
    }
    lines = {
        view: [
            "path,lat,lon",
            *(f"{view}/{n}.jpg,{lat!r},{lon!r}" for n, (lat, lon) in enumerate(points.tolist())),
        ]
        for view, points in at.items()
    }
    limit = 900_000.0
    metres = metres_between(
        at["p"][:, None, 0], at["p"][:, None, 1], at["t"][None, :, 0], at["t"][None, :, 1]
    )
    notes: list[str] = []
    dataset = folder.convert(
        make(tmp_path / "s", lines["t"], lines["p"]),
        str(tmp_path / "d"),
        max_distance_m=limit,
        report=notes.append,
    )
    near = np.flatnonzero(metres.min(axis=1) <= limit)
    assert rows(dataset, "queries", "id", "place_id") == [(n, metres[n].argmin()) for n in near]
    assert 10 < len(near) < 60
    assert notes[0] == f"queries left out because no tile is within 900000 m: {60 - len(near)}"
    # the 8 tiles west of the widest gap in longitude
    order = np.argsort(at["t"][:, 1])
    turned = at["t"][order, 1]
    widest = np.argmax(np.append(turned[1:], turned[0] + 360) - turned)
    tested = np.roll(order, -(widest + 1))[-8:]
    assert rows(dataset, "references", "id", "split") == [
        (n, "test" if n in tested else "train") for n in range(40)
    ]


def test_with_a_split_column_the_nearest_tile_is_one_of_the_querys_split(tmp_path: Path) -> None:
    tiles = [
        "path,lat,lon,set",
        "a.png,0,0,gallery",
        "b.png,0,1,train",
        "c.png,0,2,test",
        "d.png,0,3,val",
    ]
    photos = ["path,lat,lon,set", "0.jpg,0,0,train", "1.jpg,0,0,test", "2.jpg,0,0,val"]
    source = make(tmp_path / "s", tiles, photos)
    dataset = folder.convert(source, str(tmp_path / "d"), split_column="set")
    assert rows(dataset, "queries", "id", "place_id", "split") == [
        (0, 1, "train"),
        (1, 2, "test"),
        (2, 3, "val"),
    ]
    assert [split for _, split in rows(dataset, "references", "id", "split")] == [
        "gallery",
        "train",
        "test",
        "val",
    ]
    make(tmp_path / "s", tiles[:-1], photos)
    with pytest.raises(InputError, match=r"queries\.csv, line 4: no reference has the split 'val'"):
        folder.convert(source, str(tmp_path / "e"), split_column="set")


def test_equal_keys_are_one_place_and_may_lack_coordinates(tmp_path: Path) -> None:
    tiles = ["path,lat,lon,key,split", *(f"{line},train" for line in KEYS[1:])]
    photos = ["path,key,lat,lon,split", *(f"{line},train" for line in KEYED[1:])]
    source = make(tmp_path / "s", tiles, photos)
    notes: list[str] = []
    dataset = folder.convert(
        source, str(tmp_path / "d"), pair="key", split_column="split", report=notes.append
    )
    assert rows(dataset, "references", "id", "place_id", "lat", "lon") == [
        (0, 0, 1.0, 2.0),
        (1, 1, 3.0, 4.0),
        (2, 0, None, None),
        (3, 2, 5.0, 6.0),
    ]
    assert rows(dataset, "queries", "id", "place_id", "lat", "lon") == [
        (0, 1, None, None),
        (1, 0, 1.5, 2.5),
        (2, 0, None, None),
    ]
    assert notes == [
        "queries left out because no reference has their key: 1,"
        f" the first 'elsewhere' at {source}/queries.csv, line 5",
        "queries from their tiles: 79 km (median), 95 % within 79 km, the farthest 79 km",
        "no test queries: nothing to evaluate on",
    ]
    with pytest.raises(
        InputError, match=r"references\.csv, line 4: without coordinates .* give --split-column"
    ):
        folder.convert(source, str(tmp_path / "e"), pair="key")


def test_keys_without_columns_of_coordinates_give_a_note(tmp_path: Path) -> None:
    tiles = ["path,key,split", "a.png,x,train", "b.png,y,test"]
    source = make(tmp_path / "s", tiles, ["path,key,split", "0.jpg,x,train", "1.jpg,y,test"])
    notes: list[str] = []
    dataset = folder.convert(
        source, str(tmp_path / "d"), pair="key", split_column="split", report=notes.append
    )
    assert rows(dataset, "references", "id", "lat", "lon") == [(0, None, None), (1, None, None)]
    assert notes == [
        f"{source}/{name}.csv has no columns lat and lon: coordinates are null"
        for name in ("references", "queries")
    ]
    with pytest.raises(InputError, match="no column 'latitude'"):
        folder.convert(
            source, str(tmp_path / "e"), pair="key", split_column="split", lat_column="latitude"
        )


@pytest.mark.parametrize("degrees", [0, 170])
def test_places_of_several_tiles_have_their_mean_on_the_circle(
    tmp_path: Path, degrees: int
) -> None:
    # the place k lies about the antimeridian: its plain mean would lie on the other side
    points = [(9.0, "w"), (9.5, "w"), (9.9, "k"), (10.3, "k"), (10.75, "e"), (10.25, "e")]
    tiles = ["path,lat,lon,key"]
    for number, (lon, key) in enumerate(points):
        tiles.append(f"{number}.png,0,{(lon + degrees + 180) % 360 - 180},{key}")
    source = make(tmp_path / "s", tiles, ["path,key", "0.jpg,w", "1.jpg,k", "2.jpg,e"])
    dataset = folder.convert(source, str(tmp_path / "d"), pair="key", test_fraction=1 / 3)
    splits = [split for _, split in rows(dataset, "queries", "id", "split")]
    assert splits == ["train", "train", "test"]


def test_places_of_several_tiles_stay_on_one_side_of_the_strip(tmp_path: Path) -> None:
    tiles = [
        "path,lat,lon,key",
        "a.png,0,0,w",
        "b.png,0,10,w",
        "c.png,0,6,e",
        "d.png,0,7,e",
        "e.png,0,1,v",
    ]
    source = make(tmp_path / "s", tiles, ["path,key", "0.jpg,w", "1.jpg,e"])
    dataset = folder.convert(source, str(tmp_path / "d"), pair="key", test_fraction=1 / 3)
    splits = [split for _, split in rows(dataset, "references", "id", "split")]
    assert splits == ["train", "train", "test", "test", "train"]
    assert rows(dataset, "queries", "id", "split") == [(0, "train"), (1, "test")]


def test_the_eastern_strip_is_the_share_nearest_to_the_one_asked_for() -> None:
    assert choose_eastern_strip(np.array([3.0, 1.0, 2.0, 4.0, 5.0]), 0.4).tolist() == [
        False,
        False,
        False,
        True,
        True,
    ]
    # of 5 points 0 or 3 can be chosen, and 0 is nearer to 1
    assert choose_eastern_strip(np.array([1.0, 2.0, 2.0, 2.0, 1.0]), 0.2).tolist() == [False] * 5
    assert choose_eastern_strip(np.array([1.0, 2.0]), 0.0).tolist() == [False, False]
    assert choose_eastern_strip(np.array([1.0, 2.0]), 1.0).tolist() == [True, True]
    grid = np.repeat(np.arange(10.0), 7)
    assert choose_eastern_strip(grid, 0.23).tolist() == (grid >= 8).tolist()


def test_columns_files_and_name_are_options(tmp_path: Path) -> None:
    tiles = [
        '"File","Y","X","No","Area"',
        '"t/a, b.png","1.5","2.5","70","east"',
        "",
        "t/c.png, 1.25 ,2.25,9,",
    ]
    photos = ["File,Y,X,No,Area,Heading", "p/0.jpg,1.5,2.5,3,west,-12.5", "p/1.jpg,1.25,2.25,1,,"]
    source = Path(make(tmp_path / "s", tiles, photos, images=False))
    (tmp_path / "tiles.csv").write_text("\ufeff" + "\r\n".join(tiles))
    (source / "t").mkdir()
    (source / "p").mkdir()
    for name in ("t/a, b.png", "t/c.png", "p/0.jpg", "p/1.jpg"):
        (source / name).touch()
    dataset = folder.convert(
        str(source),
        str(tmp_path / "d"),
        references=str(tmp_path / "tiles.csv"),
        path_column="File",
        lat_column="Y",
        lon_column="X",
        id_column="No",
        region_column="Area",
        heading_column="Heading",
        test_fraction=0.0,
        name="mine",
        strict=True,
    )
    assert dataset.name == "mine"
    assert rows(
        dataset, "references", "id", "place_id", "uri", "lat", "lon", "region", "split"
    ) == [
        (9, 1, f"{source}/t/c.png", 1.25, 2.25, None, "train"),
        (70, 0, f"{source}/t/a, b.png", 1.5, 2.5, "east", "train"),
    ]
    assert rows(dataset, "queries", "id", "place_id", "region", "heading_deg") == [
        (1, 1, None, None),
        (3, 0, "west", -12.5),
    ]


def test_absolute_paths_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    source = make(
        tmp_path / "s", ["path,lat,lon", f"{tmp_path}/a.png,0,0"], ["path,lat,lon", "0.jpg,0,0"]
    )
    dataset = folder.convert(source, str(tmp_path / "d"), strict=True)
    assert rows(dataset, "references", "uri") == [(f"{tmp_path}/a.png",)]


def test_missing_images_are_counted_and_do_not_change_the_nearest_tile(tmp_path: Path) -> None:
    tiles = [
        "path,lat,lon,split",
        "t/a.png,0,0,train",
        "t/b.png,0,1,train",
        "t/c.png,0,2,test",
        "t/d.png,0,3,test",
    ]
    photos = ["path,lat,lon,split"]
    photos += [
        f"p/{n}.jpg,0,{n},{split}" for n, split in enumerate(["train", "train", "test", "test"])
    ]
    source = make(tmp_path / "s", tiles, photos)
    for name in ("t/a.png", "t/d.png", "p/1.jpg"):
        (Path(source) / name).unlink()
    notes: list[str] = []
    dataset = folder.convert(source, str(tmp_path / "d"), split_column="split", report=notes.append)
    assert rows(dataset, "references", "id") == [(1,), (2,)]
    assert rows(dataset, "queries", "id", "place_id") == [(2, 2), (3, 3)]
    assert notes == [
        "missing images: 3, left out with their rows: t/a.png, t/d.png, p/1.jpg",
        "queries from their tiles: 0 m (median), 95 % within 0 m, the farthest 0 m",
        "train queries left out because their place has no train reference: 1",
        "test queries that evaluation leaves out because their place has no reference: 1",
        "no train queries: nothing to train on",
    ]
    with pytest.raises(InputError, match=re.escape("missing images: 3: t/a.png, t/d.png")):
        folder.convert(source, str(tmp_path / "e"), split_column="split", strict=True)


HEADER = "path,lat,lon,key,split,heading,id"
GOOD = "a.jpg,1,2,k,train,0,5"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.jpg,one,2,k,train,0,6", "lat='one' is not a number"),
        ("b.jpg,nan,2,k,train,0,6", r"nan, 2\.0 is not within -90\.\.90"),
        ("b.jpg,1,181,k,train,0,6", r"1\.0, 181\.0 is not within"),
        ("b.jpg,,,k,train,0,6", r"coordinates are empty; fill them in, or pair by --pair key"),
        ("b.jpg,1,2,k,training,0,6", "split='training' is none of train, val, test"),
        ("b.jpg,1,2,k,gallery,0,6", "split='gallery' is none of train, val, test"),
        ("b.jpg,1,2,k,train,north,6", "heading='north' is not a number"),
        ("b.jpg,1,2,k,train,inf,6", "heading=inf is not within -360..360"),
        ("b.jpg,1,2,k,train,0,-1", "id='-1' is not a whole number, 0 or larger"),
        ("b.jpg,1,2,k,train,0,", "id is empty; give every row one"),
        (",1,2,k,train,0,6", "path is empty"),
        ("b.jpg,1,2,k,train,0", "has 6 fields, but the header has 7"),
        (
            "b.jpg,1,2,k,train,0,5",
            r"id 5 is already used at .*queries\.csv, line 2; give each row its own",
        ),
        ('"b"x.jpg,1,2,k,train,0,5', "not CSV"),
    ],
)
def test_bad_values_are_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    source = make(tmp_path / "s", [HEADER, GOOD], [HEADER, GOOD, "", line])
    columns: dict[str, Any] = {
        "split_column": "split",
        "heading_column": "heading",
        "id_column": "id",
    }
    with pytest.raises(InputError, match=rf"{source}/queries\.csv, line 4.*{message}"):
        folder.convert(source, str(tmp_path / "d"), **columns)


@pytest.mark.parametrize(
    ("references", "options", "message"),
    [
        (
            ["path,latitude,lon", "a.png,1,2"],
            {},
            r"references\.csv, line 1: no column 'lat' \(did you mean 'latitude'\?\);"
            r" columns: path, latitude, lon;",
        ),
        (
            [HEADER, GOOD],
            {"region_column": "zone"},
            "no column 'zone'; columns: path, .*; name it with --region-column",
        ),
        (
            [HEADER, GOOD],
            {"heading_column": "headings"},
            r"no column 'headings' \(did you mean 'heading'\?\)",
        ),
        (
            [HEADER, GOOD],
            {"path_column": "file"},
            "no column 'file'; .* with --path-column",
        ),
        (["path,lat,lon", "a.png,1,2"], {"pair": "key"}, "no column 'key'"),
        (
            [],
            {},
            r"references\.csv, line 1: the file ends without a row; list the references in it",
        ),
        ([HEADER], {}, r"references\.csv, line 2: the file ends without a row"),
        ([HEADER, ",1,2,,train,0,5"], {"pair": "key"}, "line 2: path is empty"),
        ([HEADER, "a.png,1,2,,train,0,5"], {"pair": "key"}, "line 2: key is empty"),
        (
            [HEADER, "a.png,1,,k,train,0,5"],
            {"pair": "key"},
            "line 2: only one of lat and lon is given; give both or leave both empty",
        ),
        (
            [HEADER, GOOD],
            {"references": "tiles.csv"},
            r"tiles\.csv is missing; .* holds queries\.csv, references\.csv",
        ),
        ([HEADER, GOOD], {"pair": "closest"}, "--pair 'closest' is none of nearest, key"),
        ([HEADER, GOOD], {"test_fraction": 1.5}, r"--test-fraction 1\.5 is not within 0\.\.1"),
        ([HEADER, GOOD], {"max_distance_m": 0.0}, r"--max-distance-m 0 must be above 0"),
        ([HEADER, GOOD], {"delimiter": "::"}, "--delimiter '::' must be one character, or comma"),
        ([HEADER, GOOD], {"decimal": ";"}, "--decimal ';' must be . or ,"),
        ([HEADER, GOOD], {"max_distance": 5.0}, "options are .*max_distance_m"),
    ],
)
def test_missing_columns_empty_files_and_wrong_options_are_refused(
    tmp_path: Path, references: list[str], options: dict[str, Any], message: str
) -> None:
    source = make(tmp_path / "s", references, [HEADER, GOOD], images=False)
    with pytest.raises(InputError, match=message):
        folder.convert(source, str(tmp_path / "d"), **options)
