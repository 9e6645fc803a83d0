from __future__ import annotations

import re
from pathlib import Path

import pytest

from s4g_ray.datasets import cvusa
from s4g_ray.errors import InputError
from tests.support.source_trees import cvusa_tree, rows

SATELLITES = [  # id, split, latitude, longitude
    (1, "train", 38.015625, -100.03125),
    (2, "train", 38.03125, -100.0625),
    (3, "test", 38.046875, -100.09375),
    (4, "train", 38.0625, -100.125),
    (5, "train", 38.078125, -100.15625),
    (6, "test", 38.09375, -100.1875),
]
OFFSET = 0.00006103515625  # degrees; panoramas are north and west of their satellite image


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("csv_at_root", [False, True])
def test_every_layout_converts_value_by_value(
    tmp_path: Path, nested: bool, csv_at_root: bool
) -> None:
    source = cvusa_tree(tmp_path / "source", nested=nested, csv_at_root=csv_at_root)
    dataset = cvusa.convert(str(source), str(tmp_path / "target"), strict=True)
    folder = "bingmap/bingmap/19" if nested else "bingmap/19"
    assert rows(
        dataset, "references", "id", "place_id", "uri", "split", "lat", "lon", "region", "source_id"
    ) == [
        (n, n, f"{source}/{folder}/{n:07d}.jpg", split, lat, lon, None, f"{n:07d}")
        for n, split, lat, lon in SATELLITES
    ]
    columns = (
        "id",
        "place_id",
        "uri",
        "split",
        "lat",
        "lon",
        "source_id",
        "heading_deg",
        "semi_positives",
    )
    assert rows(dataset, "queries", *columns) == [
        (
            n,
            n,
            f"{source}/streetview/panos/{n:07d}.jpg",
            split,
            lat + OFFSET,
            lon - OFFSET,
            f"{n:07d}",
            0.0,
            None,
        )
        for n, split, lat, lon in SATELLITES
    ]
    assert dataset.name == "cvusa"
    assert dataset.views["references"] == "Bing Maps satellite image, zoom 19"


def test_a_complete_source_gives_no_notes(tmp_path: Path) -> None:
    notes: list[str] = []
    cvusa.convert(
        str(cvusa_tree(tmp_path / "source")), str(tmp_path / "target"), report=notes.append
    )
    assert notes == []


def test_coordinates_are_null_on_request_and_required_otherwise(tmp_path: Path) -> None:
    source = cvusa_tree(tmp_path / "source")
    (source / "split_locations/all.csv").unlink()
    with pytest.raises(
        InputError, match=r"neither split_locations/all\.csv nor all\.csv; .*--no-coordinates"
    ):
        cvusa.convert(str(source), str(tmp_path / "target"))
    dataset = cvusa.convert(str(source), str(tmp_path / "target"), coordinates=False)
    for view in ("references", "queries"):
        assert rows(dataset, view, "id", "lat", "lon") == [(n, None, None) for n in range(1, 7)]


def test_a_pair_with_a_missing_image_is_left_out_whole_and_counted(tmp_path: Path) -> None:
    source = cvusa_tree(tmp_path / "source")
    for name in (
        "bingmap/19/0000002.jpg",
        "streetview/panos/0000002.jpg",
        "streetview/panos/0000006.jpg",
    ):
        (source / name).unlink()
    notes: list[str] = []
    dataset = cvusa.convert(str(source), str(tmp_path / "target"), report=notes.append)
    for view in ("references", "queries"):
        assert rows(dataset, view, "id") == [(1,), (3,), (4,), (5,)]
    listed = "bingmap/19/0000002.jpg, streetview/panos/0000002.jpg, streetview/panos/0000006.jpg"
    assert notes == [
        f"missing images: 3, left out with their rows: {listed}",
        "pairs left out for a missing image: 2",
    ]
    with pytest.raises(InputError, match=re.escape(f"missing images: 3: {listed}")):
        cvusa.convert(str(source), str(tmp_path / "strict"), strict=True)
    assert not (tmp_path / "strict").exists()


def test_more_than_ten_missing_images_are_cut_short(tmp_path: Path) -> None:
    source = cvusa_tree(tmp_path / "source", train=14, test=2)
    for number in range(1, 14):
        (source / f"bingmap/19/{number:07d}.jpg").unlink()
    notes: list[str] = []
    cvusa.convert(str(source), str(tmp_path / "target"), report=notes.append)
    assert notes[0].startswith(
        "missing images: 13, left out with their rows: bingmap/19/0000001.jpg, "
    )
    assert notes[0].endswith(" and 3 more")
    assert notes[0].count(".jpg") == 10


@pytest.mark.parametrize(
    ("file", "line", "text", "message"),
    [
        (
            "split_locations/all.csv",
            4,
            "nan,1,2,3,4",
            r"all\.csv, row 4: 'nan,1,2,3,4' is not within -90\.\.90",
        ),
        (
            "split_locations/all.csv",
            2,
            "1,2,3,181,4",
            r"all\.csv, row 2: '1,2,3,181,4' is not within",
        ),
        ("split_locations/all.csv", 6, "1,2,3", r"all\.csv, row 6: '1,2,3' is not sat_lat"),
        ("split_locations/all.csv", 5, "", r"all\.csv, row 5: '' is not sat_lat"),
        (
            "split_locations/all.csv",
            1,
            "1,2,north,4",
            r"all\.csv, row 1: '1,2,north,4' is not sat_lat",
        ),
        (
            "splits/val-19zl.csv",
            2,
            "bingmap/19/0000007.jpg,streetview/panos/0000003.jpg,x",
            "has rows 1 to 6.* row 7",
        ),
        (
            "splits/val-19zl.csv",
            2,
            "bingmap/19/0000000.jpg,streetview/panos/0000003.jpg,x",
            "has rows 1 to 6.* row 0",
        ),
        (
            "splits/train-19zl.csv",
            3,
            "bingmap/19/abc.jpg,p.jpg",
            r"train-19zl\.csv, line 3: 'bingmap/19/abc\.jpg,p",
        ),
        (
            "splits/train-19zl.csv",
            1,
            "bingmap/19/0000001.jpg",
            r"train-19zl\.csv, line 1: .* is not NUMBER\.jpg",
        ),
        (
            "splits/val-19zl.csv",
            1,
            "bingmap/19/0000002.jpg,streetview/panos/0000002.jpg,x",
            r"val-19zl\.csv, line 1: id 2 is already used at .*train-19zl\.csv, line 2",
        ),
    ],
)
def test_faulty_rows_are_refused_with_file_and_row(
    tmp_path: Path, file: str, line: int, text: str, message: str
) -> None:
    source = cvusa_tree(tmp_path / "source")
    for view, name in (("bingmap/19", "0000007"), ("bingmap/19", "0000000")):
        (source / view / f"{name}.jpg").touch()
    lines = (source / file).read_text().splitlines()
    lines[line - 1] = text
    (source / file).write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        cvusa.convert(str(source), str(tmp_path / "target"))
    assert not (tmp_path / "target").exists()


def test_a_wrong_layout_names_both_variants_and_the_nearest(tmp_path: Path) -> None:
    source = cvusa_tree(tmp_path / "source", nested=True)
    (source / "bingmap/bingmap/19").rename(source / "bingmap/bingmap/20")
    (source / "splits/val-19zl.csv").unlink()
    with pytest.raises(InputError) as error:
        cvusa.convert(str(source), str(tmp_path / "target"))
    assert str(error.value).splitlines() == [
        f"{source} has no known layout; it holds bingmap, split_locations, splits, streetview",
        "layout 'bingmap' needs splits/train-19zl.csv, splits/val-19zl.csv, bingmap/19,"
        " streetview/panos",
        "layout 'nested bingmap' needs splits/train-19zl.csv, splits/val-19zl.csv,"
        " bingmap/bingmap/19, streetview/panos",
        "nearest: 'bingmap', which lacks splits/val-19zl.csv (splits holds train-19zl.csv);"
        " bingmap/19 (bingmap holds bingmap)",
    ]
