"""An opened gallery answers as its images alone do."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import s4g_ray
from s4g_ray.data.area import Area
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError, RunError
from s4g_ray.gallery.build import build_gallery
from s4g_ray.gallery.calibration import Calibration, NoneModel
from s4g_ray.gallery.description import info_table
from s4g_ray.gallery.gallery import Gallery, open_gallery
from s4g_ray.progress import Reporter
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config
from tests.support import galleries

COUNT = NUM_TRAIN + NUM_TEST
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def built(synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    galleries.build(folder, synthetic.uri, folder / "gallery", attribution="made up")
    return folder / "gallery"


@pytest.fixture
def opened(built: Path) -> Gallery:
    return open_gallery(str(built))


@pytest.fixture(scope="module")
def vectors(synthetic: GeoDataset) -> np.ndarray:
    paths = [f"{synthetic.uri}/images/references/{i}.png" for i in range(COUNT)]
    return galleries.embed_files(paths, tiny_config("-", synthetic.uri))


def test_a_search_ranks_the_tiles_by_the_cosine_of_their_images(
    opened: Gallery, vectors: np.ndarray
) -> None:
    ids, scores = opened.search(vectors[:7], 5)
    expected_ids, expected = galleries.rank(vectors[:7], vectors, np.arange(COUNT), 5)
    np.testing.assert_allclose(scores, expected, atol=2e-3)  # the table is float16
    np.testing.assert_array_equal(ids[:, 0], np.arange(7))
    assert (ids == expected_ids).mean() > 0.9


def test_photos_are_embedded_as_tiles_are(
    opened: Gallery, synthetic: GeoDataset, vectors: np.ndarray
) -> None:
    images = [np.asarray(Image.open(f"{synthetic.uri}/images/references/{i}.png")) for i in (3, 8)]
    np.testing.assert_allclose(opened.encode(images), vectors[[3, 8]], atol=1e-5)
    np.testing.assert_allclose(opened.encode(images, "references"), vectors[[3, 8]], atol=1e-5)
    large = [np.asarray(Image.fromarray(image).resize((90, 60))) for image in images]
    assert opened.encode(large).shape == (2, opened.dim)
    assert opened.encode([]).shape == (0, opened.dim)
    with pytest.raises(ValueError, match="is not uint8"):
        opened.encode([images[0][..., 0]])


def test_an_area_restricts_the_search_and_pads(
    opened: Gallery, synthetic: GeoDataset, vectors: np.ndarray
) -> None:
    table = synthetic.references.to_table().sort_by("id")
    lat, lon = table["lat"].to_numpy(), table["lon"].to_numpy()
    area = Area.bounds(-40, -30, 60, 30)
    inside = np.flatnonzero((lat >= -30) & (lat <= 30) & (lon >= -40) & (lon <= 60))
    ids, scores = opened.search(vectors[:5], COUNT + 3, area=area)
    assert opened.count_within(area) == len(inside) < COUNT
    for row in range(5):
        assert sorted(ids[row, : len(inside)]) == inside.tolist()
    assert (ids[:, len(inside) :] == -1).all()
    assert np.isneginf(scores[:, len(inside) :]).all()
    nowhere, _ = opened.search(vectors[:1], 4, area=Area.circle(89.0, 0.0, 10.0))
    assert nowhere.tolist() == [[-1] * 4]


def test_tiles_are_sorted_and_found_by_id(opened: Gallery, synthetic: GeoDataset) -> None:
    table = synthetic.references.to_table().sort_by("id")
    np.testing.assert_array_equal(opened.tiles.ids, table["id"].to_numpy())
    np.testing.assert_array_equal(opened.tiles.lat, table["lat"].to_numpy())
    np.testing.assert_array_equal(opened.tiles.lon, table["lon"].to_numpy())
    assert np.isnan(opened.tiles.size_m).all()
    assert opened.rows(np.array([[5, 2]])).tolist() == [[5, 2]]
    with pytest.raises(KeyError, match="999"):
        opened.rows(np.array([2, 999]))


def test_images_and_embeddings_of_tiles_can_be_read(
    opened: Gallery, synthetic: GeoDataset, vectors: np.ndarray
) -> None:
    path = Path(synthetic.uri) / "images/references/17.png"
    assert opened.read_tile_bytes(17) == (path.read_bytes(), "image/png")
    np.testing.assert_array_equal(opened.read_tile(17), np.asarray(Image.open(path)))
    ids = np.array([90, 2, 41])
    np.testing.assert_allclose(opened.embedding_of(ids), vectors[ids], atol=1e-3)
    with pytest.raises(KeyError):
        opened.read_tile(-1)


def test_a_copy_answers_without_the_data_set(
    synthetic: GeoDataset, tmp_path: Path, vectors: np.ndarray
) -> None:
    shutil.copytree(synthetic.uri, tmp_path / "data")
    galleries.build(tmp_path, str(tmp_path / "data"), tmp_path / "gallery")
    shutil.rmtree(tmp_path / "data")
    shutil.move(tmp_path / "gallery", tmp_path / "elsewhere")
    moved = open_gallery(str(tmp_path / "elsewhere"))
    image = moved.read_tile(4)
    np.testing.assert_allclose(moved.encode([image], "references"), vectors[[4]], atol=1e-5)
    np.testing.assert_allclose(moved.embedding_of(np.array([4])), vectors[[4]], atol=1e-3)


def test_without_copies_images_stay_at_their_source(synthetic: GeoDataset, tmp_path: Path) -> None:
    report = galleries.build(
        tmp_path, synthetic.uri, tmp_path / "gallery", copy_images=False, splits=["test"]
    )
    assert report.bytes_copied == 0
    assert not (tmp_path / "gallery/images").exists()
    opened = open_gallery(str(tmp_path / "gallery"))
    assert opened.num_tiles == NUM_TEST
    path = Path(synthetic.uri) / f"images/references/{NUM_TRAIN}.png"
    assert opened.read_tile_bytes(NUM_TRAIN)[0] == path.read_bytes()


def test_info_tells_the_facts(opened: Gallery, built: Path) -> None:
    info = dict(opened.info)
    assert json.loads(json.dumps(info)) == info
    assert info["num_tiles"] == COUNT
    assert info["version"] == opened.version == 1
    assert info["model"]["architecture"] == "test_convnext"
    assert info["attribution"] == "made up"
    assert info["sources"][0]["tiles"] == COUNT
    assert not info["has_calibration"]
    assert info_table(info).row_count >= 9


def test_info_tells_the_turns_and_the_date_of_a_calibration(opened: Gallery, built: Path) -> None:
    none = NoneModel((0.0,) * 5, (0.0,) * 5, (1.0,) * 5, bias=0.0, threshold=0.0)
    calibration = Calibration(
        temperature=0.1,
        rest_logit=0.5,
        none=none,
        offsets=(0.1, 0.2),
        levels=(0.5, 0.9),
        num_candidates=3,
        turns=4,
        gallery_version=1,
        created="2026-11-26T18:40:00+00:00",
    )
    path = built / "calibration.json"
    try:
        calibration.save(str(built))
        assert opened.has_calibration
        assert opened.info["has_calibration"]
        assert opened.info["calibration"]["turns"] == 4
        shown = show(opened.info)
        assert "searches with --turns 4, of 2026-11-26T18:40:00+00:00, on version 1" in shown
        path.write_text("{}")
        assert "is not of format 's4g-calibration'; run" in show(opened.info)
    finally:
        path.unlink()
    assert "none; see `s4g gallery calibrate`" in show(opened.info)


def show(info: Mapping[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(info_table(info))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_public_name_opens_a_gallery(built: Path) -> None:
    assert s4g_ray.open_gallery(str(built)).num_tiles == COUNT


def test_bounds_take_the_shorter_way_around() -> None:
    from s4g_ray.gallery.store.tiles import Tiles

    lon = np.array([179.0, -178.0, 176.5])
    tiles = Tiles(np.arange(3), np.array([-1.0, 2.0, 0.0]), lon, np.full(3, np.nan))
    assert tiles.bounds() == (176.5, -1.0, -178.0, 2.0)
    one = Tiles(np.arange(1), np.array([5.0]), np.array([7.0]), np.array([60.0]))
    assert one.bounds() == (7.0, 5.0, 7.0, 5.0)


def test_a_folder_that_is_no_gallery_is_refused(
    synthetic: GeoDataset, built: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"is no gallery: gallery\.json is missing"):
        open_gallery(synthetic.uri)
    (tmp_path / "gallery.json").write_text('{"format": "s4g-gallery", "version": 9}')
    with pytest.raises(InputError, match="of version 9 of its format"):
        open_gallery(str(tmp_path))
    (tmp_path / "gallery.json").write_text("[1")
    with pytest.raises(InputError, match="not valid JSON"):
        open_gallery(str(tmp_path))
    shutil.copytree(built, tmp_path / "cut")
    next((tmp_path / "cut/v=0001/index").glob("*/index.bin")).write_bytes(b"x")
    with pytest.raises(RunError, match=r"index\.bin"):
        open_gallery(str(tmp_path / "cut"))


def test_other_weights_in_the_model_folder_are_refused(
    built: Path, tmp_path: Path, synthetic: GeoDataset
) -> None:
    shutil.copytree(built, tmp_path / "gallery")
    galleries.build(tmp_path, synthetic.uri, tmp_path / "other", seed=5, splits=["test"])
    ours = json.loads((tmp_path / "gallery/gallery.json").read_text())["model"]
    theirs = json.loads((tmp_path / "other/gallery.json").read_text())["model"]
    shutil.rmtree(tmp_path / "gallery/model")
    shutil.copytree(tmp_path / "other/model", tmp_path / "gallery/model")
    opened = open_gallery(str(tmp_path / "gallery"))
    with pytest.raises(InputError) as caught:
        opened.encode([np.zeros((8, 8, 3), np.uint8)])
    assert ours["weights_sha256"] in str(caught.value)
    assert theirs["weights_sha256"] in str(caught.value)


def test_a_build_tells_what_it_took_off_weights_from_elsewhere(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    state = load_file(galleries.write_weights(tmp_path))
    weights = str(tmp_path / "wrapped.safetensors")
    save_file({f"module.{key}": value for key, value in state.items()}, weights)
    shown = io.StringIO()
    build_gallery(
        weights,
        synthetic.uri,
        str(tmp_path / "gallery"),
        config=tiny_config(tmp_path / "run", synthetic.uri),
        splits=["test"],
        reporter=Reporter(Console(file=shown, width=1000)),
    )
    assert f"took the prefix 'module.' off all {len(state)} keys" in shown.getvalue()
