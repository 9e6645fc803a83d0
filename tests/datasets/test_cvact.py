from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from s4g_ray.datasets import cvact
from s4g_ray.errors import InputError
from tests.support.source_trees import cvact_name, cvact_tree, cvact_utm, rows, save_cvact_mat

NAMES = [cvact_name(row) for row in range(8)]
NAMES[1] = NAMES[1][:-2]
# The tree has 8 rows: 0..3 are train, 4 and 5 val, 5..7 test; the test ids sort as rows 7, 6, 5.
IDENTITIES = [  # id, place_id, split, folder
    (0, 0, "train", "ANU_data_small"),
    (1, 1, "train", "ANU_data_small"),
    (2, 2, "train", "ANU_data_small"),
    (3, 3, "train", "ANU_data_small"),
    (4, 4, "val", "ANU_data_small"),
    (5, 5, "val", "ANU_data_small"),
    (13, 5, "test", "ANU_data_test"),
    (14, 6, "test", "ANU_data_test"),
    (15, 7, "test", "ANU_data_test"),
]


def utm_of(lat: Any, lon: Any) -> tuple[Any, Any]:
    """Convert WGS84 degrees to easting, northing in zone 55 south: an oracle.

    Krueger's series of third order.
    """
    a = 6_378_137.0
    f = 1 / 298.257223563
    meridian = 147.0
    n = f / (2 - f)
    rectifying = a / (1 + n) * (1 + n**2 / 4 + n**4 / 64)
    alpha = (n / 2 - 2 * n**2 / 3 + 5 * n**3 / 16, 13 * n**2 / 48 - 3 * n**3 / 5, 61 * n**3 / 240)
    phi = np.radians(lat)
    dlon = np.radians(np.asarray(lon) - meridian)
    e = 2 * np.sqrt(n) / (1 + n)
    t = np.sinh(np.arctanh(np.sin(phi)) - e * np.arctanh(e * np.sin(phi)))
    xi = np.arctan2(t, np.cos(dlon))
    eta = np.arctanh(np.sin(dlon) / np.sqrt(1 + t**2))
    east = eta + sum(c * np.cos(2 * j * xi) * np.sinh(2 * j * eta) for j, c in enumerate(alpha, 1))
    north = xi + sum(c * np.sin(2 * j * xi) * np.cosh(2 * j * eta) for j, c in enumerate(alpha, 1))
    return 500_000 + 0.9996 * rectifying * east, 10_000_000 + 0.9996 * rectifying * north


@pytest.mark.parametrize("characters", [False, True])
@pytest.mark.parametrize("northing_first", [False, True])
def test_every_form_of_act_data_converts_value_by_value(
    tmp_path: Path, characters: bool, northing_first: bool
) -> None:
    source = cvact_tree(tmp_path / "source", characters=characters, northing_first=northing_first)
    notes: list[str] = []
    dataset = cvact.convert(str(source), str(tmp_path / "target"), strict=True, report=notes.append)
    assert (dataset.name, notes) == ("cvact", [])
    columns = ("id", "place_id", "split", "uri", "source_id", "region")
    assert rows(dataset, "references", *columns) == [
        (
            i,
            p,
            split,
            f"{source}/{folder}/satview_polish/{NAMES[p]}_satView_polish.jpg",
            NAMES[p],
            None,
        )
        for i, p, split, folder in IDENTITIES
    ]
    assert rows(dataset, "queries", *columns, "heading_deg", "semi_positives") == [
        (
            i,
            p,
            split,
            f"{source}/{folder}/streetview/{NAMES[p]}_grdView.jpg",
            NAMES[p],
            None,
            0.0,
            None,
        )
        for i, p, split, folder in IDENTITIES
    ]
    for view in ("references", "queries"):
        found = rows(dataset, view, "id", "place_id", "lat", "lon")
        _, places, lat, lon = (np.array(column) for column in zip(*found, strict=True))
        wanted = np.array([cvact_utm(place) for place in places])
        np.testing.assert_allclose(np.stack(utm_of(lat, lon), axis=1), wanted, atol=1e-3)  # metres
    assert -35.4 < found[0][2] < -35.2  # Canberra
    assert 149.0 < found[0][3] < 149.3


def test_test_images_that_the_list_lacks_are_kept_without_coordinates(tmp_path: Path) -> None:
    source = cvact_tree(tmp_path / "source", unlisted=2)
    notes: list[str] = []
    dataset = cvact.convert(str(source), str(tmp_path / "target"), report=notes.append)
    # sorted, the unlisted names come before the listed ones: positions 0 and 1, after twice 8 rows
    assert rows(dataset, "queries", "id", "place_id", "split", "lat", "lon", "source_id")[-2:] == [
        (16, 16, "test", None, None, "not-in-the-list-00-xyz"),
        (17, 17, "test", None, None, "not-in-the-list-01-xyz"),
    ]
    assert notes == ["test images that ACT_data.mat does not list, kept without coordinates: 2"]


def test_a_pair_with_a_missing_image_is_left_out_whole_and_counted(tmp_path: Path) -> None:
    source = cvact_tree(tmp_path / "source")
    train = source / f"ANU_data_small/streetview/{NAMES[2]}_grdView.jpg"
    test = source / f"ANU_data_test/satview_polish/{NAMES[6]}_satView_polish.jpg"
    train.unlink()
    test.unlink()
    (source / "ANU_data_test/streetview/notes.txt").touch()
    notes: list[str] = []
    dataset = cvact.convert(str(source), str(tmp_path / "target"), report=notes.append)
    for view in ("references", "queries"):
        assert rows(dataset, view, "id") == [(0,), (1,), (3,), (4,), (5,), (13,), (15,)]
    missing = f"{train.relative_to(source)}, {test.relative_to(source)}"
    assert notes == [
        f"missing images: 2, left out with their rows: {missing}",
        "files of ANU_data_test/streetview left out because they do not end in _grdView.jpg: 1",
        "pairs left out for a missing image: 2",
    ]
    with pytest.raises(InputError, match="missing images: 2") as error:
        cvact.convert(str(source), str(tmp_path / "strict"), strict=True)
    assert missing in str(error.value)


def test_the_test_set_is_left_out_on_request_and_required_otherwise(tmp_path: Path) -> None:
    source = cvact_tree(tmp_path / "source")
    (source / "ANU_data_test/satview_polish").rename(source / "ANU_data_test/satellite")
    with pytest.raises(
        InputError,
        match=r"lacks ANU_data_test/streetview or ANU_data_test/satview_polish.*--no-test",
    ):
        cvact.convert(str(source), str(tmp_path / "target"))
    dataset = cvact.convert(str(source), str(tmp_path / "target"), test=False)
    assert rows(dataset, "queries", "id", "split") == [
        (i, split) for i, _, split, _ in IDENTITIES[:6]
    ]


def variables(**changes: Any) -> dict[str, Any]:
    made = {
        "panoIds": np.array(NAMES, dtype=object)[:, None],
        "utm": np.array([cvact_utm(row) for row in range(8)]),
        "trainSet": {"trainNum": 4, "trainInd": np.array([[1], [2], [3], [4]])},
        "valSet": {"valNum": 2, "valInd": np.array([[5], [6]])},
    }
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def utm_with(row: int, values: tuple[float, float]) -> Any:
    utm = variables()["utm"]
    utm[row] = values
    return utm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utm": None, "valSet": None}, r"ACT_data\.mat lacks utm, valSet"),
        ({"utm": np.zeros((8, 3))}, r"utm has shape \(8, 3\), but 8 panoIds need \(8, 2\)"),
        (
            {"utm": utm_with(2, cvact_utm(2)[::-1])},
            r"utm row 3 is \[6090100\.0, 692150\.0\]; it must be an easting",
        ),
        ({"utm": utm_with(5, (np.nan, 6.09e6))}, r"utm row 6 is \[nan, 6090000\.0\]"),
        ({"utm": np.ones((8, 2))}, r"utm row 1 is \[1\.0, 1\.0\]"),
        (
            {"valSet": {"valNum": 2, "valInd": np.array([5, 9])}},
            r"valSet\.valInd holds 9, which is not a row of 1 to 8",
        ),
        ({"valSet": {"valNum": 2, "valInd": np.array([0, 5])}}, r"valSet\.valInd holds 0"),
        ({"valSet": {"valNum": 2, "valInd": np.array([4.5])}}, r"valSet\.valInd holds 4\.5"),
        ({"valSet": {"valNum": 2, "valInd": "five"}}, r"valSet\.valInd does not hold numbers"),
        (
            {"valSet": {"other": np.array([5])}},
            r"valSet is not one struct with a field valInd.*it has \('other',\)",
        ),
        ({"valSet": np.array([5])}, "valSet is not one struct with a field valInd"),
        (
            {"valSet": {"valNum": 2, "valInd": np.array([4, 5])}},
            "trainSet and valSet share 1 rows, the first 4",
        ),
    ],
)
def test_a_faulty_list_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = cvact_tree(tmp_path / "source")
    save_cvact_mat(source / "ACT_data.mat", **variables(**changes))
    with pytest.raises(InputError, match=message):
        cvact.convert(str(source), str(tmp_path / "target"))


def test_unused_rows_may_lack_a_position_and_repeated_rows_are_used_once(
    tmp_path: Path,
) -> None:
    source = cvact_tree(tmp_path / "source")
    save_cvact_mat(
        source / "ACT_data.mat",
        **variables(
            utm=utm_with(7, (np.nan, np.nan)), valSet={"n": 3, "valInd": np.array([5.0, 6.0, 5.0])}
        ),
    )
    notes: list[str] = []
    dataset = cvact.convert(str(source), str(tmp_path / "target"), test=False, report=notes.append)
    assert rows(dataset, "queries", "id")[-2:] == [(4,), (5,)]
    assert notes == ["rows that valSet repeats, used once: 1"]


def test_a_file_that_is_not_matlab_is_refused(tmp_path: Path) -> None:
    source = cvact_tree(tmp_path / "source")
    whole = (source / "ACT_data.mat").read_bytes()
    for content in (
        b"",
        b"not a MATLAB file" * 20,
        whole[: len(whole) // 2],
        b"\x89HDF\r\n\x1a\n" + whole,
    ):
        (source / "ACT_data.mat").write_bytes(content)
        with pytest.raises(InputError, match=r"ACT_data\.mat is not a MATLAB 5 file"):
            cvact.convert(str(source), str(tmp_path / "target"))


def test_a_wrong_layout_is_refused_with_the_needed_and_the_found_names(tmp_path: Path) -> None:
    source = cvact_tree(tmp_path / "source")
    (source / "ANU_data_small/satview_polish").rename(source / "ANU_data_small/satview")
    with pytest.raises(InputError) as error:
        cvact.convert(str(source), str(tmp_path / "target"))
    assert str(error.value).splitlines() == [
        f"{source} has no known layout; it holds ACT_data.mat, ANU_data_small, ANU_data_test",
        "layout 'ANU_data_small' needs ACT_data.mat, ANU_data_small/streetview,"
        " ANU_data_small/satview_polish",
        "nearest: 'ANU_data_small', which lacks ANU_data_small/satview_polish"
        " (ANU_data_small holds satview, streetview)",
    ]


@pytest.mark.parametrize("fields", [["valInd"], ["valInd", "valNum"], ["valNum", "rows"]])
def test_the_rows_are_found_by_name_or_else_in_the_second_field(
    tmp_path: Path, fields: list[str]
) -> None:
    source = cvact_tree(tmp_path / "s")
    values: dict[str, Any] = {
        "valInd": np.array([[5], [6]]),
        "valNum": 2,
        "rows": np.array([[5], [6]]),
    }
    mat = scipy.io.loadmat(str(source / "ACT_data.mat"))
    kept = {name: value for name, value in mat.items() if not name.startswith("__")}
    save_cvact_mat(
        source / "ACT_data.mat", **{**kept, "valSet": {name: values[name] for name in fields}}
    )
    dataset = cvact.convert(str(source), str(tmp_path / "d"))
    assert dataset.table("queries", ["val"]).ids.tolist() == [4, 5]
