from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s4g_ray.arrays import spread_rows
from s4g_ray.data.tables.embedding_table import read_embeddings
from s4g_ray.errors import RunError
from s4g_ray.index.plan import Kind, plan_index
from s4g_ray.index.sharded.merging import ALL
from s4g_ray.index.sharded.requests import Staged
from s4g_ray.index.sharded.shard import IndexShard, search_once
from s4g_ray.index.sharded.sharding import (
    RowRange,
    deal_rows,
    open_sources,
    read_ranges,
)
from s4g_ray.index.sharded.versions import FailedVersion, ShardSetup
from s4g_ray.index.top_k import Found
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage.manifest import publish
from tests.support.embedding_tables import (
    Array,
    break_part,
    random_unit,
    sort_everything,
    write_parts,
    write_table,
)
from tests.support.faulty_s3 import Store, seeded


def start_shard(folder: Path | str) -> IndexShard:
    return IndexShard(ShardSetup(f"{folder}/index", 0, 1, 1, use_gpu=False))


def stage(shard: IndexShard, table: str, version: int, count: int, kind: Kind = "flat") -> Staged:
    sources, _ = open_sources([table])
    counts, _ = shard.read_heads(sources, None)
    slices = deal_rows(sources, [part.kept for part in counts], 1)[0]
    plan = plan_index(count, 16, kind=kind)
    template = None
    if plan.train_size:
        template = shard.train(
            plan, shard.sample(slices, None, spread_rows(count, plan.train_size, 0))[1]
        )
    return shard.stage(version, slices, None, plan, template, "torch")


def publish_staged(folder: Path | str, staged: Staged, count: int) -> None:
    info = {**staged.info, "num_shards": 1, "num_vectors": count, "engine": "torch"}
    publish(f"{folder}/index/v={staged.version:04d}", "index", [staged.part], None, info)


@pytest.mark.parametrize("change", ["cut", "altered", "removed"])
def test_a_part_that_is_cut_altered_or_missing_is_refused_by_name(
    tmp_path: Path, change: str
) -> None:
    rng = np.random.default_rng(0)
    sources, _ = open_sources([write_table(tmp_path / "e", np.arange(100), random_unit(rng, 100))])
    break_part(change)(tmp_path / "e/references/part-00001.parquet")
    shard = start_shard(tmp_path)
    if change != "altered":  # altered bytes are noticed when the vectors are read
        with pytest.raises(RunError, match=r"e/references/part-00001\.parquet"):
            shard.read_heads(sources, None)
    with pytest.raises(RunError, match=r"e/references/part-00001\.parquet"):
        list(read_ranges([RowRange(source, 0, 0, 50, 0) for source in sources], None))


def test_a_part_with_other_columns_or_types_is_refused_by_name(tmp_path: Path) -> None:
    ids = np.arange(20)
    table = write_parts(tmp_path / "e", [(ids, np.ones((20, 4), dtype=np.float64))], stamp=None)
    sources, _ = open_sources([table])
    shard = start_shard(tmp_path)
    with pytest.raises(
        RunError, match=r"part-00000\.parquet holds vectors of double; float16 or float32 is wanted"
    ):
        shard.read_heads(sources, None)
    with pytest.raises(RunError, match=r"holds vectors of double"):
        read_embeddings(table, "references")
    widths = [(ids, np.ones((20, 4), np.float32)), (ids + 20, np.ones((20, 5), np.float32))]
    with pytest.raises(RunError, match=r"part-00001\.parquet holds D=5, the parts before it 4"):
        read_embeddings(write_parts(tmp_path / "f", widths), "references")


def test_the_ids_of_many_parts_come_in_the_order_of_the_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(1000)[:200]
    vectors = random_unit(rng, 200)
    sources, _ = open_sources(
        [write_table(tmp_path / "e", ids, vectors, part_rows=4, group_rows=3)]
    )
    wanted = np.sort(ids[rng.random(200) < 0.5])
    counts, kept = start_shard(tmp_path).read_heads(sources, wanted)
    assert kept.tolist() == [i for i in ids.tolist() if i in set(wanted.tolist())]
    assert [count.kept for count in counts] == [
        (int(np.isin(ids[s : s + 3], wanted).sum()), int(np.isin(ids[s + 3], wanted)))
        for s in range(0, 200, 4)
    ]
    assert {count[1:] for count in counts} == {(16, "float32")}


def test_a_folder_that_holds_no_version_of_shards_is_refused_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = random_unit(rng, 60)
    VectorIndex.build(vectors, np.arange(60)).save(str(tmp_path / "index/v=0002"))
    shard = start_shard(tmp_path)
    assert shard.served_version() is None
    with pytest.raises(
        RunError, match=r"v=0002 holds an index, but no version of shards; remove it"
    ):
        shard.search(2, random_unit(rng, 3), 5)
    with pytest.raises(RunError, match=r"version 1 of \S+ is not in service \(in service: 2\)"):
        shard.search(1, random_unit(rng, 3), 5)


@pytest.mark.parametrize("kind", ["flat", "sqfp16", "ivf_sq8", "ivf_rabitq", "hnsw"])
def test_a_restarted_shard_continues_from_the_file_at_every_step(
    tmp_path: Path, kind: Kind
) -> None:
    rng = np.random.default_rng(0)
    vectors = random_unit(rng, 120)
    queries = random_unit(rng, 9)
    table = write_table(tmp_path / "e", np.arange(120), vectors)
    first = start_shard(tmp_path)
    staged = stage(first, table, 4, 120, kind)
    wanted = first.probe(staged, "torch", queries, 5, None)
    if kind == "flat":
        assert (
            wanted.ids.tolist() == sort_everything(queries, vectors, np.arange(120), 5)[0].tolist()
        )
    assert start_shard(tmp_path).served_version() is None  # unpublished versions are not loaded
    probed = start_shard(tmp_path).probe(staged, "torch", queries, 5, None)
    assert probed.ids.tolist() == wanted.ids.tolist()
    publish_staged(tmp_path, staged, 120)
    shard = start_shard(tmp_path)
    assert shard.served_version() == 4
    shard.activate(4)
    found = shard.search(4, queries, 5)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.scores, wanted.scores)


def test_a_shard_is_built_alike_from_a_store_that_fails_now_and_then(
    store: Store, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    vectors = random_unit(rng, 400)
    queries = random_unit(rng, 9)
    wanted = stage(
        start_shard(tmp_path),
        write_table(tmp_path / "e", np.arange(400), vectors, group_rows=20),
        1,
        400,
        "ivf_sq8",
    )
    remote = "s3://data/shards"
    table = write_table(f"{remote}/e", np.arange(400), vectors, group_rows=20)
    store.proxy.reset(seeded(5, 0.3))
    shard = start_shard(remote)
    staged = stage(shard, table, 1, 400, "ivf_sq8")
    assert staged.part == wanted.part
    publish_staged(remote, staged, 400)
    shard.activate(1)
    again = start_shard(remote)  # reads its file
    np.testing.assert_array_equal(again.search(1, queries, 5).ids, shard.search(1, queries, 5).ids)
    assert store.proxy.faults.total() >= 5
    store.proxy.reset(lambda _, key, __: "internal" if "/references/" in key else None)
    with pytest.raises(RunError, match=r"shards/e/references/part-0000\d\.parquet.* 6 times"):
        stage(shard, table, 2, 400)
    store.proxy.reset()
    assert shard.search(1, queries, 5).ids.shape == (9, 5)  # in service as before
    assert stage(shard, table, 2, 400).part.rows == 400


def test_a_search_ends_on_the_version_that_it_began_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    inside = threading.Event()
    resume = threading.Event()
    vectors = random_unit(rng, 100)
    queries = random_unit(rng, 9)
    shard = start_shard(tmp_path)
    for version in (1, 2):
        table = write_table(tmp_path / f"e{version}", np.arange(100) + 1000 * version, vectors)
        staged = stage(shard, table, version, 100)
        publish_staged(tmp_path, staged, 100)
        if version == 1:
            shard.activate(1)
    search = VectorIndex.search_padded

    def slow_search(index: VectorIndex, queries: Array, k: int, **options: Any) -> Found:
        inside.set()
        assert resume.wait(30)
        return search(index, queries, k, **options)

    monkeypatch.setattr(VectorIndex, "search_padded", slow_search)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(shard.search, 1, queries, 5)
        assert inside.wait(30)
        shard.activate(2)
        # both answer until every shard has activated version 2
        early = pool.submit(shard.search, 1, queries, 5)
        resume.set()
        assert (answer.result().ids // 1000 == 1).all()
        assert (early.result().ids // 1000 == 1).all()
        shard.release_previous()
    assert shard.served_version() == 2
    assert (shard.search(2, queries, 5).ids // 1000 == 2).all()
    with pytest.raises(RunError, match=r"version 1 .* is not in service \(in service: 2"):
        shard.search(1, queries, 5)


@pytest.mark.parametrize("kind", ["flat", "ivf_sq8", "hnsw"])
def test_a_shard_that_has_lost_all_of_its_vectors_finds_none_at_any_effort(kind: Kind) -> None:
    vectors = random_unit(np.random.default_rng(5), 60)
    index = VectorIndex.build(vectors, np.arange(60), kind=kind)
    index.remove(np.arange(60))
    for effort in (None, 4, ALL):
        answer = search_once(index, vectors[:3], 5, effort, None, None)
        assert answer.num_allowed == 0
        assert answer.ids.shape == (3, 5)
        assert (answer.ids == -1).all()


def test_a_missing_gpu_is_an_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    shard = IndexShard(ShardSetup(str(tmp_path / "index"), 0, 1, 1, use_gpu=True))
    with pytest.raises(RunError, match="gpus_per_shard=0"):
        shard.require_gpu()
    table = write_table(tmp_path / "e", np.arange(50), random_unit(np.random.default_rng(0), 50))
    with pytest.raises(RunError, match="gpus_per_shard=0"):
        stage(shard, table, 1, 50)


def test_a_version_loaded_at_the_start_is_freed_when_it_leaves_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RunError("stands for a version")
    freed = weakref.ref(error)
    box = [FailedVersion(1, error)]
    monkeypatch.setattr("s4g_ray.index.sharded.shard.load_newest", lambda _: box.pop())
    shard = IndexShard(ShardSetup(str(tmp_path / "index"), 0, 1, 1, use_gpu=False))
    with pytest.raises(RunError, match="stands for a version"):
        shard.search(1, np.zeros((1, 2), np.float32), 1)
    shard.withdraw(1)
    del error
    gc.collect()
    assert freed() is None
