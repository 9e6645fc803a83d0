"""Galleries tell apart what they were made from, and trust neither sizes nor names of files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError, RunError
from s4g_ray.gallery.build import add_tiles, remove_tiles
from s4g_ray.gallery.gallery import open_gallery
from s4g_ray.gallery.store import index_writer, tiles, vectors
from s4g_ray.gallery.store.images import is_copied
from s4g_ray.gallery.store.versions import open_version, publish_version
from tests.support import galleries

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def built(synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a gallery of the 24 tiles of split `test`, in half precision as asked."""
    folder = tmp_path_factory.mktemp("built")
    overrides = ["mining.index_kind=sqfp16"]
    galleries.build(folder, synthetic.uri, folder / "gallery", splits=["test"], overrides=overrides)
    return folder


@pytest.fixture
def gallery(built: Path, tmp_path: Path) -> str:
    """A gallery to be changed."""
    shutil.copytree(built / "gallery", tmp_path / "gallery")
    return str(tmp_path / "gallery")


def test_an_index_is_planned_anew_as_it_was_asked_for_where_it_doubled(
    synthetic: GeoDataset, gallery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_gallery(gallery).index.plan.kind == "sqfp16"
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "available_memory_gb", lambda: 0.01)
        patch.setattr(index_writer, "is_connected", lambda: False)
        with pytest.raises(InputError, match=r"index of 120 tiles does not fit in 0\.008 GB"):
            add_tiles(gallery, synthetic.uri)
    assert add_tiles(gallery, synthetic.uri).num_tiles == 120
    opened = open_gallery(gallery)
    assert (opened.index.plan.num_vectors, opened.index.plan.kind) == (120, "sqfp16")
    queries = opened.embedding_of(opened.tiles.ids)
    np.testing.assert_array_equal(opened.search(queries, 1)[0][:, 0], opened.tiles.ids)


def test_a_build_of_other_splits_or_without_copies_is_another(
    synthetic: GeoDataset, built: Path, gallery: str
) -> None:
    assert galleries.build(built, synthetic.uri, gallery, splits=["test"]).encoded == 0
    with pytest.raises(InputError, match="holds a gallery of 24 tiles already; add to it"):
        galleries.build(built, synthetic.uri, gallery)
    with pytest.raises(InputError, match="holds a gallery with copies of its images already"):
        galleries.build(built, synthetic.uri, gallery, splits=["test"], copy_images=False)


def test_splits_of_a_data_set_are_sources_of_their_own(synthetic: GeoDataset, gallery: str) -> None:
    add_tiles(gallery, synthetic.uri, splits=["train"])
    sources = open_gallery(gallery).snapshot.header.sources
    assert [source["splits"] for source in sources] == [["test"], ["train"]]


def test_ids_that_were_removed_already_are_named(gallery: str) -> None:
    ids = open_gallery(gallery).tiles.ids[:2]
    remove_tiles(gallery, ids=ids)
    with pytest.raises(InputError, match=rf"{ids[0]} among them; removed already\?"):
        remove_tiles(gallery, ids=ids)


@pytest.mark.parametrize("uri", ["/etc/hostname", "../secret", "images/../../secret", "http://x/y"])
def test_a_gallery_with_copies_reads_no_other_files(gallery: str, uri: str) -> None:
    version = open_version(gallery, 1)
    rows = tiles.read_tiles(version.folder, version.parts)
    column = tiles.SCHEMA.get_field_index("uri")
    values = pc.if_else(True, uri, rows["uri"])
    rows = rows.set_column(column, tiles.SCHEMA.field("uri"), values)
    parts = tiles.write_tiles(version.folder, rows, "altered")
    publish_version(
        gallery,
        1,
        parts,
        version.stamp,
        version.segments,
        version.images,
        version.index,
        version.facts,
        version.info,
    )
    opened = open_gallery(gallery)
    with pytest.raises(RunError, match=r"holds copies of its images, but the entry of tile \d+"):
        opened.read_tile_bytes(int(opened.tiles.ids[0]))


def test_copies_lie_in_the_folder_of_images() -> None:
    assert is_copied("images/v=0001-00c0ffee-00000.tar")
    for uri in ("images/", "images/..", "images/a/b", "images\\a", "image/a", "images/..\\a"):
        assert not is_copied(uri)
