"""Galleries whose images stay at their source move with them, or are told where they are now."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.data.dataset import GeoDataset, open_dataset, write_dataset
from s4g_ray.errors import InputError, RunError
from s4g_ray.gallery import update as updating
from s4g_ray.gallery.build import add_tiles, remove_tiles
from s4g_ray.gallery.gallery import Gallery, open_gallery
from s4g_ray.gallery.relocation import relocate
from s4g_ray.gallery.store.header import GalleryHeader
from s4g_ray.gallery.store.tiles import read_tiles
from tests.support import galleries
from tests.support.json_fields import documented

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def built(synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and, beside it, a gallery of its split `test`, without copies."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(synthetic.uri, folder / "data")
    galleries.build(
        folder, str(folder / "data"), folder / "gallery", splits=["test"], copy_images=False
    )
    (folder / "data").rename(folder / "moved")  # a path that was left absolute is not readable
    return folder


@pytest.fixture
def home(built: Path, tmp_path: Path) -> Path:
    """The folder `old` with both, to be moved; where it was built, nothing is any more."""
    shutil.copytree(built / "moved", tmp_path / "old/data")
    shutil.copytree(built / "gallery", tmp_path / "old/gallery")
    return tmp_path / "old"


def read_images(opened: Gallery) -> list[bytes]:
    return [opened.read_tile_bytes(int(tile_id))[0] for tile_id in opened.tiles.ids]


def stored_paths(gallery: Path) -> list[str]:
    version = open_gallery(str(gallery)).snapshot.version
    paths: list[str] = read_tiles(version.folder, version.parts, ("uri",))["uri"].to_pylist()
    return paths


def test_a_gallery_moves_with_the_images_beside_it(home: Path, tmp_path: Path) -> None:
    assert all(path.startswith("images/references/") for path in stored_paths(home / "gallery"))
    shutil.move(home, tmp_path / "elsewhere/new")
    opened = open_gallery(str(tmp_path / "elsewhere/new/gallery"))
    folder = tmp_path / "elsewhere/new/data/images/references"
    expected = [(folder / f"{tile_id}.png").read_bytes() for tile_id in opened.tiles.ids]
    assert read_images(opened) == expected
    assert opened.info["images_root"] == str(tmp_path / "elsewhere/new/data")


def test_images_that_moved_alone_are_named_once_for_all(home: Path, tmp_path: Path) -> None:
    gallery = str(home / "gallery")
    reader = open_gallery(gallery)
    before = read_images(reader)
    shutil.move(home / "data", tmp_path / "photos")
    with pytest.raises(RunError, match=rf"name their folder with `s4g gallery relocate {gallery} "):
        reader.read_tile_bytes(int(reader.tiles.ids[0]))
    for wrong in ("photos/images", "none"):
        with pytest.raises(InputError, match=r"looked for are not there, as .*; give the folder"):
            relocate(gallery, str(tmp_path / wrong))
    arguments = ["gallery", "relocate", gallery, str(tmp_path / "photos"), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    values: dict[str, Any] = json.loads(done.stdout)
    assert values.keys() == documented("s4g gallery relocate").own
    assert (values["relative"], values["absolute"]) == (len(before), 0)
    assert reader.reload()  # one that is open finds them too
    assert not reader.reload()
    assert read_images(reader) == before
    assert read_images(open_gallery(gallery)) == before


def test_changes_of_a_gallery_keep_the_folder_of_its_images(home: Path, tmp_path: Path) -> None:
    gallery = str(home / "gallery")
    shutil.move(home / "data", tmp_path / "photos")
    relocate(gallery, str(tmp_path / "photos"))
    report = add_tiles(gallery, str(tmp_path / "photos"), splits=["test"])
    assert (report.unchanged, report.version) == (24, 1)  # the same files: nothing is new
    added = add_tiles(gallery, str(tmp_path / "photos"), splits=["train"])
    assert (added.encoded, added.added) == (96, 96)
    remove_tiles(gallery, ids=np.array([0]))
    assert all(path.startswith("images/references/") for path in stored_paths(home / "gallery"))
    assert len(read_images(open_gallery(gallery))) == 119


def test_images_that_are_added_from_elsewhere_by_an_option(
    home: Path, tmp_path: Path, synthetic: GeoDataset
) -> None:
    shutil.copytree(home / "data", tmp_path / "rows")
    shutil.move(tmp_path / "rows/images", tmp_path / "other/images")
    overrides = [f"data.images_root={tmp_path}/other"]
    gallery = str(home / "gallery")
    add_tiles(gallery, str(tmp_path / "rows"), splits=["train"], overrides=overrides)
    found = relocate(gallery, str(home / "data"))
    assert (found.relative, found.absolute) == (24, 96)  # those beside `old` stay absolute
    assert len(read_images(open_gallery(gallery))) == 120


def test_a_gallery_that_holds_its_images_has_no_folder_to_name(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    galleries.build(tmp_path, synthetic.uri, tmp_path / "gallery", splits=["test"])
    with pytest.raises(InputError, match="holds copies of its images: it moves as a folder"):
        relocate(str(tmp_path / "gallery"), synthetic.uri)


def test_a_gallery_that_moved_alone_keeps_its_tiles(home: Path, tmp_path: Path) -> None:
    shutil.move(home / "gallery", tmp_path / "a/b/gallery")
    gallery = str(tmp_path / "a/b/gallery")
    with pytest.raises(RunError, match="cannot be read"):
        read_images(open_gallery(gallery))
    assert relocate(gallery, str(home / "data")).images_root == str(home / "data")
    assert len(read_images(open_gallery(gallery))) == 24


def test_a_gallery_of_absolute_paths_alone_is_renewed_by_its_data_set(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    tiles = galleries.write_tiles(tmp_path / "tiles", synthetic, [3, 4])
    gallery = tmp_path / "gallery"
    galleries.build(tmp_path, tiles.uri, gallery, copy_images=False)
    remedy = rf"all paths of images are absolute.*`s4g gallery add {gallery} DATASET`"
    with pytest.raises(InputError, match=remedy):
        relocate(str(gallery), str(tmp_path))
    shutil.copytree(synthetic.uri, tmp_path / "data")
    assert add_tiles(str(gallery), str(tmp_path / "data")).unchanged == 2
    assert all(path.startswith("images/") for path in stored_paths(gallery))
    assert open_gallery(str(gallery)).info["images_root"] == str(tmp_path / "data")


def test_a_gallery_of_absolute_paths_that_names_no_folder(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    data = shutil.copytree(synthetic.uri, tmp_path / "old/data")
    tiles = galleries.write_tiles(tmp_path / "set/tiles", open_dataset(str(data)), [3, 4])
    gallery = str(tmp_path / "gallery")
    galleries.build(tmp_path, tiles.uri, gallery, copy_images=False)
    dataclasses.replace(GalleryHeader.load(gallery), images_root=None).save(gallery)
    opened = open_gallery(gallery)
    assert opened.info["images_root"] is None
    done = CliRunner().invoke(app, ["gallery", "info", gallery], catch_exceptions=False)
    assert re.search(r"images +at their source", done.stdout)
    moved = shutil.move(data, tmp_path / "data")
    with pytest.raises(RunError, match=rf"`s4g gallery add {gallery} DATASET`.* renews their"):
        read_images(opened)
    add_tiles(gallery, str(moved), splits=["train"])
    add_tiles(gallery, str(moved))
    assert relocate(gallery, str(moved)).absolute == 0
    assert len(read_images(open_gallery(gallery))) == 120


def test_a_gallery_that_is_built_already_names_relocate_for_another_folder(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "data/images", tmp_path / "other/images")
    for root, says in ((home / "data", False), (tmp_path / "other", True)):
        galleries.build(
            tmp_path,
            str(home / "data"),
            home / "gallery",
            splits=["test"],
            copy_images=False,
            overrides=[f"data.images_root={root}"],
        )
        output = capsys.readouterr().out
        assert (f"`s4g gallery relocate {home}/gallery {root}`" in output) is says


def test_an_add_from_another_folder_does_not_resume_the_one_before(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for year, flip in (("2019", 1), ("2021", 2)):
        shutil.copytree(home / "data/images", tmp_path / year / "images")
        for path in (tmp_path / year / "images/references").iterdir():
            path.write_bytes(path.read_bytes() + bytes(flip))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    gallery = str(home / "gallery")
    dataset = str(home / "data")
    with monkeypatch.context() as patch:
        patch.setattr(updating, "embed_tiles", interrupt)
        with pytest.raises(KeyboardInterrupt):
            add_tiles(gallery, dataset, overrides=[f"data.images_root={tmp_path}/2019"])
    add_tiles(gallery, dataset, overrides=[f"data.images_root={tmp_path}/2021"])
    assert all(data.endswith(bytes(2)) for data in read_images(open_gallery(gallery)))


def test_other_images_of_the_same_names_are_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "data", tmp_path / "other")
    changed = tmp_path / "other" / stored_paths(home / "gallery")[5]
    changed.write_bytes(changed.read_bytes() + b"\0")
    with pytest.raises(InputError, match=rf"{changed} is not the image of that name"):
        relocate(str(home / "gallery"), str(tmp_path / "other"))


def test_images_beside_the_folder_are_looked_for_however_few(home: Path, tmp_path: Path) -> None:
    table = open_dataset(str(home / "data")).references.to_table().sort_by("id").slice(0, 1)
    table = table.set_column(
        table.schema.get_field_index("uri"),
        "uri",
        pa.array([str(home / "other" / Path(table["uri"][0].as_py()).name)]),
    )
    shutil.copytree(home / "data/images/references", home / "other")
    empty = open_dataset(str(home / "data")).queries.schema.empty_table()
    gallery = str(home / "gallery")
    one = write_dataset(str(home / "one"), table, empty, name="one")
    add_tiles(gallery, one.uri)
    beside = [path for path in stored_paths(home / "gallery") if path.startswith("../")]
    assert len(beside) == 1
    before = read_images(open_gallery(gallery))
    shutil.move(home / "data", tmp_path / "disk/data")
    remedy = rf"as {tmp_path}/disk/other/.*there: {beside[0]}\); .*`s4g gallery add {gallery} "
    with pytest.raises(InputError, match=remedy):
        relocate(gallery, str(tmp_path / "disk/data"))
    add_tiles(gallery, str(tmp_path / "disk/data"), splits=["test"])
    assert read_images(open_gallery(gallery)) == before
