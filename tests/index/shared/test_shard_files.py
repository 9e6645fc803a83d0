"""A version of shards that is changed file by file answers as one that is built anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from s4g_ray.errors import RunError
from s4g_ray.index.plan import plan_index
from s4g_ray.index.sharded.merging import merge_found
from s4g_ray.index.shared.shard_files import ShardChange, change_shards
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage.manifest import open_published, publish, read_part
from tests.support.embedding_tables import random_unit

K = 9
SHARDS = 3
Array = NDArray[Any]


def places(ids: Array) -> Array:
    """lat, lon that follow from ids."""
    return np.stack([ids % 90 - 45.0, ids % 180 - 90.0], axis=1)


@pytest.fixture
def version(tmp_path: Path) -> tuple[str, Array, Array]:
    """Three flat shards of 20, 21 and 19 vectors in a folder; their ids and vectors."""
    rng = np.random.default_rng(3)
    ids = rng.permutation(400)[:60]
    vectors = random_unit(rng, 60)
    folder = str(tmp_path / "old")
    plan = dataclasses.replace(plan_index(60, vectors.shape[1], kind="flat"), num_shards=SHARDS)
    parts = []
    for number, rows in enumerate(np.split(np.arange(60), [20, 41])):
        index = VectorIndex.empty(plan, engine="faiss")
        index.add(vectors[rows], ids[rows], places(ids[rows]))
        parts.append(index.save_part(folder, f"shard-{number:05d}.faiss"))
    info = {**index.info, "engine": "faiss", "num_vectors": 60, "num_shards": SHARDS}
    publish(folder, "index", parts, info=info)
    return folder, ids, vectors


def search(folder: str, queries: Array) -> tuple[Array, Array]:
    manifest = open_published(folder, "index")
    found = []
    for part in manifest.parts:
        index = VectorIndex.load_part(folder, part, manifest.info, engine="faiss")
        found.append(index.search_padded(queries, K))
    return merge_found(found, K)


def test_added_replaced_and_removed_vectors_are_found_as_numpy_finds_them(
    version: tuple[str, Array, Array], tmp_path: Path
) -> None:
    folder, ids, vectors = version
    rng = np.random.default_rng(4)
    order = np.argsort(ids)
    removed = np.sort(ids[[0, 25, 50]])
    new_ids = np.arange(500, 507)
    put = np.concatenate([np.sort(ids[[5, 30]]), new_ids])
    put_vectors = random_unit(rng, len(put))
    steps: list[tuple[int, int]] = []
    target = str(tmp_path / "new")
    info = change_shards(
        folder,
        target,
        ShardChange(removed, put, put_vectors, places(put)),
        lambda done, total: steps.append((done, total)),
    )
    expected = dict(zip(ids[order].tolist(), vectors[order], strict=True))
    for gone in removed.tolist():
        del expected[gone]
    expected.update(zip(put.tolist(), put_vectors, strict=True))
    all_ids = np.array(sorted(expected))
    matrix = np.stack([expected[i] for i in all_ids.tolist()])
    queries = np.concatenate([put_vectors, random_unit(rng, 20)])
    found, scores = search(target, queries)
    best = np.argsort(-(queries @ matrix.T), axis=1, kind="stable")[:, :K]
    np.testing.assert_array_equal(found, all_ids[best])
    np.testing.assert_allclose(
        scores, np.take_along_axis(queries @ matrix.T, best, axis=1), atol=1e-6
    )
    parts = open_published(target, "index").parts
    assert info["num_vectors"] == len(all_ids) == sum(part.rows for part in parts)
    assert max(part.rows for part in parts) - min(part.rows for part in parts) <= 2
    assert steps == [(1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(search(folder, vectors)[0][:, 0], ids)  # the old one is as it was


def test_a_shard_without_a_change_is_copied(
    version: tuple[str, Array, Array], tmp_path: Path
) -> None:
    folder, ids, _ = version
    nothing = ShardChange(ids[:1], ids[:0], np.empty((0, 8), np.float32), np.empty((0, 2)))
    change_shards(folder, str(tmp_path / "new"), nothing, lambda *_: None)
    old = open_published(folder, "index").parts
    new = open_published(str(tmp_path / "new"), "index").parts
    assert [ours == theirs for ours, theirs in zip(new, old, strict=True)] == [False, True, True]
    assert read_part(str(tmp_path / "new"), new[2]) == read_part(folder, old[2])


def test_an_index_of_nothing_is_refused(version: tuple[str, Array, Array], tmp_path: Path) -> None:
    folder, ids, vectors = version
    everything = ShardChange(np.sort(ids), ids[:0], vectors[:0], places(ids[:0]))
    with pytest.raises(RunError, match=r"no vector of .*old would be left"):
        change_shards(folder, str(tmp_path / "new"), everything, lambda *_: None)
    with pytest.raises(RunError, match="holds no published index"):
        open_published(str(tmp_path / "new"), "index")


@pytest.mark.parametrize("damage", ["removed", "cut short", "another file", "altered in place"])
def test_a_damaged_shard_is_named_with_its_remedy(
    version: tuple[str, Array, Array], tmp_path: Path, damage: str
) -> None:
    folder, ids, _ = version
    path = Path(folder, open_published(folder, "index").parts[1].name)
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(data[:16])
    elif damage == "another file":
        path.write_bytes(b"\1" * len(data))
    else:
        path.write_bytes(data[:-4] + b"\1\1\1\1")
    change = ShardChange(
        np.sort(ids[20:41]), ids[:0], np.empty((0, 8), np.float32), places(ids[:0])
    )
    with pytest.raises(RunError, match=rf"{path.name}, a shard .* restore this file, or build"):
        change_shards(folder, str(tmp_path / "new"), change, lambda *_: None)
