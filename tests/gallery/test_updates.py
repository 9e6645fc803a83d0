"""Galleries that are changed: only what is new is embedded, and versions are whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s4g_ray.data.area import Area
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.encoder import embedding_job
from s4g_ray.errors import BadImageError, InputError, OwnershipLostError
from s4g_ray.gallery import update as updating
from s4g_ray.gallery.build import add_tiles, remove_tiles
from s4g_ray.gallery.gallery import Gallery, open_gallery
from s4g_ray.gallery.store import embedding, images, index_writer, vectors
from s4g_ray.gallery.store.header import GalleryHeader
from s4g_ray.storage import files
from tests.support import galleries

HALF = list(range(60))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def built(synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set `half` of the first 60 tiles, and a gallery of it."""
    folder = tmp_path_factory.mktemp("built")
    dataset = galleries.write_tiles(folder / "half", synthetic, HALF)
    galleries.build(folder, dataset.uri, folder / "gallery")
    return folder


@pytest.fixture
def half(built: Path) -> str:
    return str(built / "half")


@pytest.fixture
def gallery(built: Path, tmp_path: Path) -> str:
    """A gallery of the first 60 tiles, to be changed."""
    shutil.copytree(built / "gallery", tmp_path / "gallery")
    return str(tmp_path / "gallery")


@pytest.fixture(scope="module")
def undisturbed(
    built: Path, synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the data set `more` of changed_tiles, and a gallery that it was added to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(built / "gallery", folder / "gallery")
    add_tiles(str(folder / "gallery"), changed_tiles(synthetic, folder / "more").uri)
    return folder


def answers(opened: Gallery) -> tuple[Any, Any]:
    """Return what all tiles are most like."""
    queries = opened.embedding_of(opened.tiles.ids)
    return opened.search(queries, 4)


def require_equal(one: Gallery, other: Gallery) -> None:
    np.testing.assert_array_equal(one.tiles.ids, other.tiles.ids)
    np.testing.assert_array_equal(one.tiles.lat, other.tiles.lat)
    np.testing.assert_array_equal(one.tiles.lon, other.tiles.lon)
    for ours, theirs in zip(answers(one), answers(other), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for tile_id in one.tiles.ids[::7].tolist():
        assert one.read_tile_bytes(tile_id) == other.read_tile_bytes(tile_id)


def changed_tiles(synthetic: GeoDataset, folder: Path) -> GeoDataset:
    """Tiles 50..64: 5 of 50..59 have another image, 60..64 are new."""
    uris = {i: f"{synthetic.uri}/images/references/{i + 40}.png" for i in range(50, 55)}
    return galleries.write_tiles(folder, synthetic, list(range(50, 65)), uri=uris)


def test_add_embeds_only_new_and_changed_images(
    synthetic: GeoDataset, gallery: str, tmp_path: Path
) -> None:
    before = open_gallery(gallery)
    dataset = changed_tiles(synthetic, tmp_path / "more")
    report = add_tiles(gallery, dataset.uri)
    assert (report.added, report.changed, report.unchanged) == (5, 5, 5)
    assert (report.encoded, report.num_read, report.num_tiles) == (10, 15, 65)
    after = open_gallery(gallery)
    assert after.version == 2
    whole = galleries.write_tiles(
        tmp_path / "whole",
        synthetic,
        list(range(65)),
        uri={i: f"{synthetic.uri}/images/references/{i + 40}.png" for i in range(50, 55)},
    )
    galleries.build(tmp_path, whole.uri, tmp_path / "anew")
    require_equal(after, open_gallery(str(tmp_path / "anew")))
    # the reader of the version before goes on, until it reloads
    assert before.num_tiles == 60
    assert before.read_tile_bytes(50)[0] != after.read_tile_bytes(50)[0]
    assert before.embedding_of(np.array([50])).shape == (1, before.dim)
    assert before.reload()
    assert not before.reload()
    require_equal(before, after)


def test_add_of_the_same_tiles_changes_nothing(gallery: str, half: str) -> None:
    report = add_tiles(gallery, half)
    assert (report.encoded, report.unchanged, report.version) == (0, 60, 1)
    assert files.list_names(gallery) == ["gallery.json", "images", "model", "v=0001"]


def test_a_tile_that_moves_keeps_its_embedding(
    synthetic: GeoDataset, gallery: str, tmp_path: Path
) -> None:
    lat = {3: float(open_gallery(gallery).tiles.lat[3]) + 1e-4}
    dataset = galleries.write_tiles(tmp_path / "moved", synthetic, [2, 3], lat=lat)
    report = add_tiles(gallery, dataset.uri)
    assert (report.encoded, report.unchanged, report.version) == (0, 2, 2)
    opened = open_gallery(gallery)
    assert opened.tiles.lat[3] == lat[3]
    query = opened.embedding_of(np.array([3]))
    near = Area.circle(lat[3], float(opened.tiles.lon[3]), 1.0)
    assert opened.search(query, 1, area=near)[0].tolist() == [[3]]


def test_ids_of_another_place_are_refused(
    synthetic: GeoDataset, gallery: str, tmp_path: Path
) -> None:
    dataset = galleries.write_tiles(tmp_path / "other", synthetic, [2, 3], lat={3: 1.5})
    with pytest.raises(InputError, match=r"tile 3 lies [\d,]+ m from the one of that id"):
        add_tiles(gallery, dataset.uri)
    assert open_gallery(gallery).version == 1


def test_remove_takes_an_area_or_ids(synthetic: GeoDataset, gallery: str, tmp_path: Path) -> None:
    opened = open_gallery(gallery)
    area = Area.bounds(-180, -90, 180, 0)
    south = opened.tiles.lat <= 0
    assert remove_tiles(gallery, area=area).removed == south.sum()
    rest = np.flatnonzero(~south)
    remove_tiles(gallery, ids=opened.tiles.ids[rest[:3]])
    anew = galleries.write_tiles(tmp_path / "rest", synthetic, rest[3:].tolist())
    galleries.build(tmp_path, anew.uri, tmp_path / "anew")
    assert opened.reload()
    require_equal(opened, open_gallery(str(tmp_path / "anew")))


def test_remove_refuses_what_is_not_there(gallery: str) -> None:
    with pytest.raises(InputError, match=r"2 of 3 ids are of no tile in .*, 777 among them"):
        remove_tiles(gallery, ids=np.array([777, 3, 888]))
    with pytest.raises(InputError, match=r"no tile of .* has its centre in this area"):
        remove_tiles(gallery, area=Area.circle(89, 0, 5))
    with pytest.raises(InputError, match=r"all 60 tiles of .* would be removed"):
        remove_tiles(gallery, area=Area.bounds(-180, -90, 180, 90))
    with pytest.raises(InputError, match="either an area or ids"):
        remove_tiles(gallery)
    assert open_gallery(gallery).version == 1


def image_versions(gallery: str) -> list[str]:
    return [name.partition("-")[0] for name in files.list_names(f"{gallery}/images")]


def test_two_versions_stay_and_what_they_need(gallery: str, half: str) -> None:
    for tile_id in (1, 2, 3):
        remove_tiles(gallery, ids=np.array([tile_id]))
    assert files.list_names(f"{gallery}/v=0001") == ["embeddings"]
    assert not files.exists(f"{gallery}/v=0002")
    assert files.exists(f"{gallery}/v=0003/index")
    add_tiles(gallery, half)  # tiles 1, 2 and 3 are back
    assert open_gallery(gallery).num_tiles == 60
    assert image_versions(gallery) == ["v=0001", "v=0005"]


def test_many_small_tables_are_joined(
    gallery: str, synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updating, "MAX_SEGMENTS", 2)
    for number in range(60, 63):
        dataset = galleries.write_tiles(tmp_path / f"tile-{number}", synthetic, [number])
        add_tiles(gallery, dataset.uri)
    opened = open_gallery(gallery)
    assert set(opened.snapshot.segments.tolist()) <= {3, 4}
    whole = galleries.write_tiles(tmp_path / "whole", synthetic, list(range(63)))
    galleries.build(tmp_path, whole.uri, tmp_path / "anew")
    require_equal(opened, open_gallery(str(tmp_path / "anew")))
    add_tiles(gallery, changed_tiles(synthetic, tmp_path / "last").uri)
    assert not files.exists(f"{gallery}/v=0001")


POINTS = ["stage", "embed", "index", "publish", "header"]


def fail_at(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the next update at a point, once."""
    places: dict[str, tuple[Any, str]] = {
        "stage": (updating, "embed_tiles"),
        "embed": (updating, "read_embedded_ids"),
        "index": (updating, "write_tiles"),
        "publish": (updating, "publish_version"),
        "header": (GalleryHeader, "save"),
    }
    owner, name = places[point]
    original = getattr(owner, name)

    def interrupt(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(owner, name, original)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupt)


@pytest.mark.parametrize("point", POINTS)
def test_an_interrupted_add_leaves_the_old_version_and_resumes(
    undisturbed: Path,
    gallery: str,
    point: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(point, monkeypatch)
    more = str(undisturbed / "more")
    with pytest.raises(KeyboardInterrupt):
        add_tiles(gallery, more)
    old = open_gallery(gallery)
    assert (old.version, old.num_tiles) == (1, 60)
    if point != "stage":  # the embeddings are not computed again
        monkeypatch.setattr(embedding_job, "embed", None)
    report = add_tiles(gallery, more)
    assert (report.added, report.changed, report.num_tiles) == (5, 5, 65)
    require_equal(open_gallery(gallery), open_gallery(str(undisturbed / "gallery")))
    assert not files.exists(f"{gallery}/v=0002/_work")
    for folder in ("tiles", "index"):  # what the interrupted writer left is removed
        assert len(files.list_names(f"{gallery}/v=0002/{folder}")) == 1


def test_what_an_interrupted_add_left_does_not_stay(
    synthetic: GeoDataset, gallery: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at("publish", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        add_tiles(gallery, changed_tiles(synthetic, tmp_path / "more").uri)
    remove_tiles(gallery, ids=np.array([0]))
    assert open_gallery(gallery).num_tiles == 59
    assert files.list_names(f"{gallery}/v=0002") == ["_MANIFEST.json", "index", "tiles"]
    assert image_versions(gallery) == ["v=0001"]


PLACES: list[tuple[Any, str]] = [
    (images, "read_ranges"),
    (updating, "embed_tiles"),
    (index_writer, "load_index"),
    (updating, "write_tiles"),
]


@pytest.mark.parametrize(("owner", "name"), PLACES)
def test_a_writer_that_lost_its_lease_alters_nothing_of_the_next(
    synthetic: GeoDataset,
    undisturbed: Path,
    gallery: str,
    tmp_path: Path,
    owner: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(owner, name)
    other = galleries.write_tiles(tmp_path / "other", synthetic, list(range(70, 80)))

    def lose_lease(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, original)
        files.remove(f"{gallery}/{files.LEASE}")
        add_tiles(gallery, other.uri)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, lose_lease)
    message = "was taken over by another process, which has ended"
    with pytest.raises(OwnershipLostError, match=message):
        add_tiles(gallery, str(undisturbed / "more"))
    opened = open_gallery(gallery)
    assert opened.tiles.ids.tolist() == [*range(60), *range(70, 80)]
    for tile_id in (59, 70, 79):
        path = Path(synthetic.uri, f"images/references/{tile_id}.png")
        assert opened.read_tile_bytes(tile_id)[0] == path.read_bytes()
    queries = opened.embedding_of(opened.tiles.ids)
    assert opened.search(queries, 1)[0][:, 0].tolist() == opened.tiles.ids.tolist()


def test_embedding_ends_when_the_lease_is_lost(
    undisturbed: Path, gallery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_lease(*_: Any, on_progress: Any, **__: Any) -> None:
        on_progress(1, 10)
        files.remove(f"{gallery}/{files.LEASE}")
        on_progress(2, 10)
        pytest.fail("it went on")

    monkeypatch.setattr(embedding, "BEAT_S", 0.0)
    monkeypatch.setattr(embedding_job, "embed", lose_lease)
    with pytest.raises(OwnershipLostError, match="was taken over"):
        add_tiles(gallery, str(undisturbed / "more"))


def build_and_die(folder: Path, dataset: str) -> None:
    """Build a gallery, and kill the process before it is published."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(updating, "publish_version", die)  # noqa: B010 (mypy)
    galleries.build(folder, dataset, folder / "gallery")


def test_a_build_that_was_killed_resumes(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=build_and_die, args=(tmp_path, synthetic.uri)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(InputError, match="is no gallery"):
        open_gallery(str(tmp_path / "gallery"))
    other = galleries.write_tiles(tmp_path / "other", synthetic, HALF)
    with pytest.raises(InputError, match="was begun with"):
        galleries.build(tmp_path, other.uri, tmp_path / "gallery")
    monkeypatch.setattr(embedding_job, "embed", None)  # nothing is left to embed
    report = galleries.build(tmp_path, synthetic.uri, tmp_path / "gallery")
    assert report.num_tiles == 120
    names = files.list_names(str(tmp_path / "gallery"))
    assert names == ["gallery.json", "images", "model", "v=0001"]


def test_a_built_gallery_is_not_built_again(
    synthetic: GeoDataset, gallery: str, half: str, tmp_path: Path
) -> None:
    again = galleries.build(tmp_path, half, gallery)
    assert (again.version, again.encoded, again.unchanged) == (1, 0, 60)
    with pytest.raises(InputError, match="holds a gallery of 60 tiles already; add to it"):
        galleries.build(tmp_path, synthetic.uri, gallery)
    with pytest.raises(InputError, match="was made with weights_sha256") as caught:
        galleries.build(tmp_path, half, gallery, seed=4)
    made_with = json.loads(Path(gallery, "gallery.json").read_text())["model"]
    assert made_with["weights_sha256"] in str(caught.value)
    with pytest.raises(InputError, match="was made with preprocessing"):
        add_tiles(gallery, synthetic.uri, overrides=["data.antialias=false"])


def test_bad_input_is_refused_before_anything_is_written(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "gallery"
    table = synthetic.references.to_table().drop(["lat", "lon"])
    unplaced = write_dataset(
        str(tmp_path / "unplaced"), table, synthetic.queries.to_table(), name="unplaced"
    )
    with pytest.raises(InputError, match=r"120 of 120 references of .* have no lat and lon"):
        galleries.build(tmp_path, unplaced.uri, target)
    with pytest.raises(InputError, match="holds no references of split gallery"):
        galleries.build(tmp_path, synthetic.uri, target, splits=["gallery"])
    with pytest.raises(InputError, match="split 'tset' is none of"):
        galleries.build(tmp_path, synthetic.uri, target, splits=["tset"])
    monkeypatch.setattr(vectors, "available_memory_gb", lambda: 0.01)
    monkeypatch.setattr(index_writer, "is_connected", lambda: False)
    with pytest.raises(InputError, match=r"does not fit in 0\.008 GB .* name a Ray cluster"):
        galleries.build(tmp_path, synthetic.uri, target)
    assert not target.exists()
    with pytest.raises(InputError, match="is no gallery"):
        add_tiles(str(target), synthetic.uri)


def test_a_bad_image_stops_or_is_left_out(
    synthetic: GeoDataset, gallery: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no image")
    uris = {61: f"{tmp_path}/bad.png", 62: f"{tmp_path}/missing.png"}
    dataset = galleries.write_tiles(tmp_path / "more", synthetic, [60, 61, 62], uri=uris)
    with pytest.raises(BadImageError, match=r"id 62: .*missing\.png.*set data\.on_bad_image=skip"):
        add_tiles(gallery, dataset.uri)
    assert open_gallery(gallery).version == 1
    report = add_tiles(gallery, dataset.uri, overrides=["data.on_bad_image=skip"])
    assert (report.added, report.num_tiles) == (1, 61)
    assert sorted(reason.split(",")[0].split(":")[0] for reason in report.bad_images) == [
        "id 61",
        "id 62",
    ]
    assert open_gallery(gallery).tiles.ids[-1] == 60
