from __future__ import annotations

import os
import posixpath
from pathlib import Path

import pyarrow as pa
import pytest

from s4g_ray.data.dataset import open_dataset, write_dataset
from s4g_ray.data.format.image_paths import find_root, list_prefixes, relate, resolve, shorten
from s4g_ray.data.tables.arrow_texts import read_paths
from tests.conftest import tables


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


@pytest.mark.parametrize("root", ["/w/x/y/data", "/w/x/y"])
def test_paths_beside_a_root_above_the_data_set_stay_absolute(root: str) -> None:
    beside = f"{posixpath.dirname(root)}/beside/a.jpg"
    column = pa.chunked_array([[f"{root}/b/c.jpg", beside]], pa.string())
    assert shorten(column, list_prefixes("/w/x/y/data/set", root)).to_pylist() == [
        "b/c.jpg",
        beside,
    ]


def test_images_in_and_beside_a_data_set_are_found_by_a_link_to_it(tmp_path: Path) -> None:
    disk = Path(os.path.realpath(tmp_path)) / "disk"
    (tmp_path / "home").mkdir()
    link = tmp_path / "home/set"
    columns = tables()[1].to_pydict()

    def write(folder: Path, beside: Path) -> None:
        names = [str(folder / "0.jpg"), str(beside / "1.jpg"), "2.jpg", "x/3.jpg"]
        queries = pa.table({**columns, "uri": names})
        write_dataset(str(folder), tables()[0], queries, name="n")

    def read(folder: Path) -> list[str]:
        table = open_dataset(str(folder)).table("queries", ["train", "test"])
        return sorted(os.path.realpath(uri) for uri in table.uris)

    wanted = [
        f"{disk}/{name}" for name in ("photos/1.jpg", "set/0.jpg", "set/2.jpg", "set/x/3.jpg")
    ]
    write(disk / "set", disk / "photos")
    link.symlink_to(disk / "set")
    assert read(link) == read(disk / "set") == wanted
    (disk / "set/dataset.json").unlink()
    write(link, link.parent / "photos")  # by the link: the images are beside it
    wanted[0] = f"{os.path.realpath(link.parent)}/photos/1.jpg"
    assert read(link) == read(disk / "set") == sorted(wanted)


def test_a_data_set_opened_by_a_link_finds_images_beside_its_own_folder(tmp_path: Path) -> None:
    for name in ("disk/set", "disk/photos", "home"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home/set").symlink_to(tmp_path / "disk/set")
    root = find_root(str(tmp_path / "home/set"), "../photos")
    assert root == os.path.realpath(tmp_path / "disk/photos")
    (tmp_path / "home/photos").mkdir()
    assert find_root(str(tmp_path / "home/set"), "../photos") == str(tmp_path / "home/photos")
