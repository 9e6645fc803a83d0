"""A list that is empty, or ends after its header, is one message that names the file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s4g_ray.datasets import cvact, cvusa, folder, vigor
from s4g_ray.datasets.published import cvcities, denseuav, gta_uav, uav_visloc
from s4g_ray.errors import InputError
from tests.support.drone_trees import (
    cities_tree,
    dense_tree,
    gta_entry,
    gta_tree,
    visloc_tiles,
    visloc_tree,
)
from tests.support.source_trees import cvact_tree, cvusa_tree, save_cvact_mat, vigor_tree

SIDE: dict[str, Any] = {"satellite_size": (8, 8), "panorama_size": (8, 8)}
TILE = "4_0_6_13.png"
LISTED = [gta_entry("1.png", (4472.2, 9460.9), {TILE: 0.473})]
FOLDER = {"queries": "path,lat,lon", "references": "path,lat,lon"}


def make_folder(root: Path) -> None:
    root.mkdir(parents=True)
    for name, header in FOLDER.items():
        (root / f"{name}.csv").write_text(f"{header}\n{name}.png,1.0,2.0\n")
        (root / f"{name}.png").touch()


def make_tiles(root: Path) -> dict[str, Any]:
    tiles = visloc_tiles(root, [(29.75, 115.98)], 200.0)
    return {"tiles": tiles.uri, "train_flights": "01", "test_flights": "02"}


# each reader: its source, how it is converted, and its lists
READERS: dict[str, tuple[Callable[[Path], Any], Any, dict[str, Any], list[str]]] = {
    "cvusa": (
        lambda root: cvusa_tree(root, **SIDE),
        cvusa.convert,
        {},
        ["splits/train-19zl.csv", "splits/val-19zl.csv", "split_locations/all.csv"],
    ),
    "cvact": (lambda root: cvact_tree(root, **SIDE), cvact.convert, {}, ["ACT_data.mat"]),
    "vigor": (
        lambda root: vigor_tree(root, **SIDE),
        vigor.convert,
        {},
        ["splits/Chicago/satellite_list.txt", "splits/Seattle/same_area_balanced_train.txt"],
    ),
    "denseuav": (dense_tree, denseuav.convert, {}, ["Dense_GPS_ALL.txt"]),
    "gta_uav": (
        lambda root: gta_tree(root, {"cross-train": LISTED, "cross-test": LISTED}, [TILE]),
        gta_uav.convert,
        {},
        ["cross-area-drone2sate-train.json", "cross-area-drone2sate-test.json"],
    ),
    "uav_visloc": (
        lambda root: visloc_tree(root, {"01": [(29.75, 115.98)], "02": [(29.75, 115.98)]}),
        uav_visloc.convert,
        {},  # made with the test's tiles
        ["01/01.csv", "02/02.csv"],
    ),
    "cvcities": (
        lambda root: cities_tree(root, {"paris": [(48.85, 2.35)], "london": [(51.5, -0.12)]}),
        cvcities.convert,
        {"train_cities": "paris", "test_cities": "london"},
        ["paris/img_info.csv", "london/img_info.csv"],
    ),
    "folder": (make_folder, folder.convert, {}, ["queries.csv", "references.csv"]),
}
CASES = [(reader, name) for reader, parts in READERS.items() for name in parts[3]]


def empty(path: Path, *, header: bool) -> None:
    """Leave nothing of a list, or what stands before its first entry."""
    if path.suffix == ".json" and header:
        path.write_text("[]")
    elif path.suffix == ".mat" and header:
        rows = {"trainNum": 0, "trainInd": np.zeros((0, 1))}
        sets = {"trainSet": rows, "valSet": rows}
        save_cvact_mat(path, panoIds=np.zeros((0, 1), object), utm=np.zeros((0, 2)), **sets)
    else:
        has_header = path.read_text().startswith(("num,", "path,")) if header else False
        path.write_text(path.read_text().splitlines()[0] + "\n" if has_header else "\n" * header)


@pytest.mark.parametrize("header", [False, True], ids=["empty", "header"])
@pytest.mark.parametrize(("reader", "name"), CASES)
def test_a_list_without_entries_is_one_message_with_the_file(
    tmp_path: Path, reader: str, name: str, header: bool
) -> None:
    make, convert, options, _ = READERS[reader]
    source = tmp_path / "source"
    make(source)
    empty(source / name, header=header)
    if reader == "uav_visloc":
        options = make_tiles(tmp_path / "tiles")
    with pytest.raises(InputError, match=re.escape(str(source / name))) as error:
        convert(str(source), str(tmp_path / "target"), **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "target").exists()
