from __future__ import annotations

import os
import posixpath
from pathlib import Path

import pyarrow as pa
import pytest

from s4g_ray.data.format.image_paths import find_root, list_prefixes, relate, resolve, shorten
from s4g_ray.data.tables.arrow_texts import read_paths


@pytest.mark.parametrize(
    ("dataset", "root", "stored"),
    [
        ("/data/set", "/data/set", None),
        ("/data/set", "/data/set/images", "images"),
        ("/data/set", "/data/photos", "../photos"),
        ("/data/set", "/data/photos/2024", "../photos/2024"),
        ("/data/set", "/data", ".."),
        ("/data/photos/made/set", "/data/photos", "../.."),
        ("/data/set", "/data2/photos", "/data2/photos"),
        ("/data/a/set", "/data/b/photos", "/data/b/photos"),
        ("/set", "/photos", "/photos"),
        ("/data/set", "/", "/"),
        ("/data/set", "s3://bucket/photos", "s3://bucket/photos"),
        ("s3://bucket/set", "s3://bucket/photos", "../photos"),
        ("s3://bucket/x/set", "s3://bucket/x/photos", "../photos"),
        ("s3://bucket/x/set", "s3://other/x/photos", "s3://other/x/photos"),
    ],
)
def test_a_root_below_beside_or_above_the_data_set_is_stored_relative_and_found_again(
    dataset: str, root: str, stored: str | None
) -> None:
    assert relate(dataset, root) == stored
    assert find_root(dataset, stored) == root


@pytest.mark.parametrize("scheme", ["", "s3:/"])
@pytest.mark.parametrize("root", ["/x/data/set", "/x/data/photos", "/x/else/photos"])
def test_paths_are_shortened_where_they_move_along_and_resolve_to_what_they_were(
    scheme: str, root: str
) -> None:
    dataset = f"{scheme}/x/data/set"
    root = f"{scheme}{root}"
    names = ["a.jpg", "b/c d.jpg", "é#%?.jpg", "../beside/e.jpg", "../../above/f.jpg"]
    given = [scheme + posixpath.normpath(f"{root.removeprefix('s3:/')}/{name}") for name in names]
    given += ["a.jpg", "../photos/g.jpg", "gs://b/h.jpg", f"{root}//i.jpg"]
    column = pa.chunked_array([given[:2], given[2:]], pa.string())
    found = shorten(column, list_prefixes(dataset, root)).to_pylist()
    moves_along = "else" not in root
    assert found[:3] == names[:3]
    assert found[3] == (names[3] if moves_along else given[3])
    assert found[4:] == given[4:]
    for path, whole in zip(found[:5], given[:5], strict=True):
        assert resolve(root, path) == whole
    resolved = [resolve(root, path) for path in found]
    assert list(read_paths(pa.chunked_array([found], pa.string()), root)) == resolved


def test_a_data_set_opened_by_a_link_finds_images_beside_its_own_folder(tmp_path: Path) -> None:
    for name in ("disk/set", "disk/photos", "home"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home/set").symlink_to(tmp_path / "disk/set")
    root = find_root(str(tmp_path / "home/set"), "../photos")
    assert root == os.path.realpath(tmp_path / "disk/photos")
    (tmp_path / "home/photos").mkdir()
    assert find_root(str(tmp_path / "home/set"), "../photos") == str(tmp_path / "home/photos")
