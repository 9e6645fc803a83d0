"""A gallery in shards answers as one in a single process, and all readers share its shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from s4g_ray.data.area import Area
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.gallery.build import add_tiles, remove_tiles
from s4g_ray.gallery.gallery import Gallery, open_gallery
from s4g_ray.gallery.store import index_writer
from s4g_ray.gallery.store.versions import open_version
from s4g_ray.index.shared.shared_index import NAMESPACE, SharedIndex
from tests.conftest import NUM_TEST, NUM_TRAIN
from tests.support import galleries

COUNT = NUM_TRAIN + NUM_TEST
SHARDS = ["mining.num_shards=3", "mining.index_threads=1", "mining.exact_engine=faiss"]
AREA = Area.bounds(-60, -40, 90, 40)
pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("one_thread", "ray_cluster")]


def shards_alive() -> list[str]:
    """The names of the shards of all galleries."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in found if one["namespace"] == NAMESPACE]


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(
    synthetic: GeoDataset, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same tiles as `whole`, of one process, and as `sharded`."""
    folder = tmp_path_factory.mktemp("sharded")
    half = galleries.write_tiles(folder / "half", synthetic, list(range(90)))
    galleries.build(folder, half.uri, folder / "whole")
    galleries.build(folder, half.uri, folder / "sharded", overrides=SHARDS)
    return folder


@pytest.fixture(scope="module")
def sharded(folder: Path) -> Iterator[Gallery]:
    with open_gallery(str(folder / "sharded")) as gallery:
        yield gallery
    await_true(lambda: not shards_alive())  # close leaves no actor


def index_of(gallery: Gallery) -> SharedIndex:
    assert isinstance(gallery.index, SharedIndex)
    return gallery.index


def require_same_answers(one: Gallery, other: Gallery) -> None:
    """Compare ids and scores, also with plain numpy, in an area and without."""
    vectors = one.embedding_of(one.tiles.ids)
    queries = vectors[::7]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    inside = AREA.contains(one.tiles.lat, one.tiles.lon)
    assert 5 < inside.sum() < len(inside)
    for area, rows in ((None, np.ones(len(inside), bool)), (AREA, inside)):
        ids, scores = one.search(queries, 5, area=area)
        other_ids, other_scores = other.search(queries, 5, area=area)
        np.testing.assert_array_equal(ids, other_ids)
        np.testing.assert_allclose(scores, other_scores, atol=1e-6)
        unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        expected, cosines = galleries.rank(unit, vectors[rows], one.tiles.ids[rows], 5)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_allclose(scores, cosines, atol=1e-6)


def test_readers_share_shards_that_answer_as_one_process(folder: Path, sharded: Gallery) -> None:
    index = sharded.info["index"]
    assert (index["kind"], index["is_sharded"], index["num_shards"]) == ("flat", True, 3)
    assert len(shards_alive()) == 3
    with open_gallery(str(folder / "sharded")) as second:
        assert len(shards_alive()) == 3
        with open_gallery(str(folder / "whole")) as whole:
            require_same_answers(second, whole)
            area = Area.circle(89.0, 0.0, 10.0)
            assert second.search(second.embedding_of(np.array([3])), 2, area=area)[0].max() == -1
            photos = [whole.read_tile(i) for i in (3, 80)]
            for ours, theirs in zip(second.locate(photos), whole.locate(photos), strict=True):
                assert [c.id for c in ours.candidates] == [c.id for c in theirs.candidates]
    assert len(shards_alive()) == 3  # one reader is left
    assert sharded.search(np.ones((1, sharded.dim), np.float32), 1)[0][0, 0] >= 0


@pytest.mark.parametrize("is_restarted", [True, False])
def test_a_search_survives_a_killed_shard(
    folder: Path, sharded: Gallery, is_restarted: bool
) -> None:
    ray.kill(index_of(sharded).client.shards[1], no_restart=not is_restarted)
    with open_gallery(str(folder / "whole")) as whole:
        require_same_answers(sharded, whole)


def test_a_new_version_is_loaded_beside_the_old_and_frees_it(
    synthetic: GeoDataset,
    folder: Path,
    sharded: Gallery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uris = {i: f"{synthetic.uri}/images/references/{i + 40}.png" for i in range(50, 55)}
    more = galleries.write_tiles(tmp_path / "more", synthetic, list(range(50, 100)), uri=uris)
    for name in ("whole", "sharded"):
        report = add_tiles(str(folder / name), more.uri)
        assert (report.added, report.changed, report.encoded) == (10, 5, 15)
        remove_tiles(str(folder / name), ids=np.array([7, 8, 99]))
    queries = sharded.embedding_of(np.array([7]))
    before = sharded.snapshot
    assert sharded.reload()
    assert before.index.search(queries, 1)[0].tolist() == [[7]]  # a search that began before
    assert sharded.num_tiles == 97
    with open_gallery(str(folder / "whole")) as whole:
        require_same_answers(sharded, whole)
    del before
    await_true(lambda: len(shards_alive()) == 3)
    monkeypatch.setattr(index_writer, "GROWTH", 1.1)
    grown = galleries.write_tiles(tmp_path / "grown", synthetic, list(range(100, 110)))
    assert add_tiles(str(folder / "sharded"), grown.uri).num_tiles == 107
    version = open_version(str(folder / "sharded"), sharded.version + 1)
    assert (version.facts.planned_tiles, version.facts.num_shards) == (107, 3)
