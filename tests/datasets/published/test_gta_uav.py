from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets.published import gta_uav
from s4g_ray.errors import InputError
from tests.support.drone_trees import gta_entry, gta_tree
from tests.support.source_trees import rows

# zoom 4: 691.2 m wide; zoom 5: 345.6 m; the first two as the published README pairs them
TILES = ["4_0_6_13.png", "5_0_12_27.png", "5_0_13_27.png", "5_64_12_27.png"]
SIZES = [691.2, 345.6, 345.6, 345.6]
# of the README of GTA-UAV: pair_pos_semipos_sate_loc_x_y_list
CENTRES = [(4492.8, 9331.2), (4320.0, 9504.0), (4665.6, 9504.0)]


def lists() -> dict[str, list[dict[str, Any]]]:
    first = gta_entry(
        "500_0001_0000025682.png",
        (4472.2036708036, 9460.91532053518),
        {"4_0_6_13.png": 0.473},
        {"5_0_12_27.png": 0.278, "5_0_13_27.png": 0.215},
    )
    no_positive = gta_entry("2.png", (4400.0, 9500.0), {}, {"5_0_12_27.png": 0.3, TILES[2]: 0.31})
    two = gta_entry("3.png", (4500.0, 9400.0), {TILES[0]: 0.41, TILES[2]: 0.52}, {TILES[1]: 0.2})
    return {"cross-train": [first, no_positive], "cross-test": [two, {**no_positive}]}


def test_a_folder_converts_value_by_value(tmp_path: Path) -> None:
    source = gta_tree(tmp_path / "source", lists(), TILES)
    notes: list[str] = []
    dataset = gta_uav.convert(str(source), str(tmp_path / "target"), report=notes.append)
    assert notes == ["drone images left out because no tile matches: 1"]
    assert rows(dataset, "references", "id", "place_id", "split", "source_id") == [
        *((number, number, "test", name) for number, name in enumerate(TILES)),
        (4, 0, "train", TILES[0]),
        (6, 2, "train", TILES[2]),
    ]
    sizes = rows(dataset, "references", "place_id", "size_m")
    np.testing.assert_allclose([size for _, size in sizes[:1]], SIZES[:1], rtol=1e-6)
    assert {place: round(size, 1) for place, size in sizes} == dict(enumerate(SIZES))
    # the own tile is that of the largest overlap; the others are semi-positives: in train all that
    # are listed, in test those that are positive, too
    assert rows(dataset, "queries", "id", "place_id", "split", "semi_positives") == [
        (0, 0, "train", [1, 2]),
        (1, 2, "train", [1]),
        (2, 2, "test", [0]),
    ]


def test_distances_on_the_earth_are_those_on_the_map(tmp_path: Path) -> None:
    source = gta_tree(tmp_path / "source", lists(), TILES)
    dataset = gta_uav.convert(str(source), str(tmp_path / "target"))
    points = [row[1:] for row in rows(dataset, "references", "id", "lat", "lon")[:3]]
    points += [row[1:] for row in rows(dataset, "queries", "id", "lat", "lon")]
    wanted = [*CENTRES, (4472.2036708036, 9460.91532053518), (4400.0, 9500.0), (4500.0, 9400.0)]
    for lat, lon in points:
        assert max(abs(lat), abs(lon)) < 0.05
    for first, a in zip(points, wanted, strict=True):
        for second, b in zip(points, wanted, strict=True):
            found = float(metres_between(*first, *second))
            assert found == pytest.approx(float(np.hypot(a[0] - b[0], a[1] - b[1])), abs=2e-3)
    # y grows southward, x eastward
    assert gta_uav.to_degrees(0, 0)[0] > 0 > gta_uav.to_degrees(0, 0)[1]


def test_the_offset_of_a_tile_is_in_its_256_pixels(tmp_path: Path) -> None:
    source = gta_tree(tmp_path / "source", lists(), TILES)
    dataset = gta_uav.convert(str(source), str(tmp_path / "target"))
    placed = {
        name: (lat, lon)
        for name, lat, lon in rows(dataset, "references", "source_id", "lat", "lon")
    }
    plain = placed["5_0_12_27.png"]
    moved = placed["5_64_12_27.png"]
    for first, second in ((plain[0], moved[0]), (moved[1], plain[1])):
        assert first > second
    assert float(metres_between(*plain, *moved)) == pytest.approx(345.6 / 4 * 2**0.5, abs=1e-3)


def test_names_of_the_first_release_have_no_offset(tmp_path: Path) -> None:
    entries = {
        "same-train": [gta_entry("1.png", (3633.4, 7140.5), {"5_10_20.png": 0.57})],
        "same-test": [gta_entry("2.png", (3633.4, 7140.5), {"5_10_20.png": 0.5})],
    }
    source = gta_tree(tmp_path / "source", entries, ["5_10_20.png", "note.txt.png"])
    notes: list[str] = []
    dataset = gta_uav.convert(
        str(source), str(tmp_path / "target"), area="same", report=notes.append
    )
    assert notes == ["files of satellite left out that are not ZOOM_OFFSET_X_Y.png: note.txt.png"]
    [(lat, lon)] = {row[1:] for row in rows(dataset, "references", "id", "lat", "lon")}
    # the README's pair_pos_sate_loc_x_y_list of this tile
    assert (lat, lon) == pytest.approx(gta_uav.to_degrees(3628.8, 7084.8), abs=1e-12)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[{}]", r"entry 1: not a drone image .*KeyError"),
        ("{}", "is no list of drone images"),
        ("[", "is not JSON"),
        ("[3]", "entry 1: not a drone image"),
    ],
)
def test_malformed_lists_are_refused(tmp_path: Path, entries: str, message: str) -> None:
    source = gta_tree(tmp_path / "source", lists(), TILES)
    (source / "cross-area-drone2sate-test.json").write_text(entries)
    with pytest.raises(InputError, match=rf"drone2sate-test.json.* {message}"):
        gta_uav.convert(str(source), str(tmp_path / "target"))


def test_missing_images_are_counted_and_refused_when_strict(tmp_path: Path) -> None:
    source = gta_tree(tmp_path / "source", lists(), TILES)
    (source / "drone/images/2.png").unlink()
    notes: list[str] = []
    dataset = gta_uav.convert(str(source), str(tmp_path / "target"), report=notes.append)
    assert notes[0] == "missing images: 1, left out with their rows: drone/images/2.png"
    assert [row[0] for row in rows(dataset, "queries", "id")] == [0, 2]
    with pytest.raises(InputError, match="missing images: 1"):
        gta_uav.convert(str(source), str(tmp_path / "other"), strict=True)
