from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.arrays import spread_rows
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.tables.embedding_table import read_embedding_parts, read_embeddings
from s4g_ray.errors import RunError
from s4g_ray.index.plan import Kind, plan_index
from s4g_ray.index.sharded.shard import IndexShard, ShardSetup, Staged
from s4g_ray.index.sharded.shard_group import shard_options
from s4g_ray.index.sharded.sharding import (
    Found,
    PartCount,
    RowRange,
    TablePart,
    check_ids,
    check_vectors,
    kept_rows,
    merge_found,
    open_sources,
    read_slices,
    share_rows,
    sorted_ids,
)
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage.manifest import Part, publish
from tests.support.embedding_tables import (
    STAMP,
    Array,
    random_unit,
    sort_everything,
    write_parts,
    write_table,
)


def fake_sources(count: int) -> list[TablePart]:
    return [
        TablePart("/t", Part(f"references/part-{i:05d}.parquet", 0, 0, "")) for i in range(count)
    ]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 10**6)
)
def test_merged_answers_equal_sorting_all_by_score_and_then_id(
    widths: list[int], k: int, seed: int
) -> None:
    """Few different scores: ties within an answer, between answers, and across place k."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(100)[: sum(widths)] for _ in range(3)])
    scores = (rng.integers(-2, 3, ids.shape) / 2).astype(np.float32)
    edges = np.cumsum([0, *widths])
    found: list[Found] = [(ids[:, a:b], scores[:, a:b]) for a, b in pairwise(edges)]
    merged_ids, merged_scores = merge_found(found, k)
    for row in range(3):
        pairs = zip(scores[row].tolist(), ids[row].tolist(), strict=True)
        wanted = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k]
        assert (
            list(zip(merged_scores[row].tolist(), merged_ids[row].tolist(), strict=True)) == wanted
        )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.integers(1, 6))
def test_shards_hold_ranges_of_row_order_that_cover_all_kept_rows_evenly(
    counts: list[int], num_shards: int
) -> None:
    sources, every = (
        fake_sources(len(counts)),
        [(p, row) for p, count in enumerate(counts) for row in range(count)],
    )
    if len(every) < num_shards:
        with pytest.raises(
            RunError, match=rf"{len(every)} references cannot fill mining.num_shards={num_shards}"
        ):
            share_rows(sources, counts, num_shards)
        return
    shares = share_rows(sources, counts, num_shards)
    held = [
        [(sources.index(s.source), row) for s in share for row in range(s.start, s.stop)]
        for share in shares
    ]
    assert list(chain(*held)) == every
    sizes = [len(rows) for rows in held]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(piece) for share in shares for piece in share)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 99))
def test_a_sample_takes_one_row_of_each_of_so_many_equal_ranges(
    num_rows: int, size: int, seed: int
) -> None:
    rows = spread_rows(num_rows, size, seed)
    assert rows.tolist() == spread_rows(num_rows, size, seed).tolist()
    if size >= num_rows:
        assert rows.tolist() == list(range(num_rows))
        return
    for i, row in enumerate(rows.tolist()):
        assert num_rows * i // size <= row < num_rows * (i + 1) // size


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=10), st.sets(st.integers(0, 20), min_size=1))
def test_kept_rows_are_those_whose_id_is_wanted(ids: list[int], wanted: set[int]) -> None:
    found = kept_rows(np.array(ids, dtype=np.int64), np.array(sorted(wanted)))
    assert found.tolist() == [row for row, i in enumerate(ids) if i in wanted]


def test_slices_are_read_as_filtering_and_cutting_the_whole_table_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, vectors = rng.permutation(1000)[:230], random_unit(rng, 230)
    sources, _ = open_sources([write_table(tmp_path / "e", ids, vectors)])
    wanted = np.sort(rng.choice(ids, 120, replace=False))
    kept = np.array([row for row in range(230) if ids[row] in set(wanted.tolist())])
    counts = [sum(1 for row in kept if row // 50 == part) for part in range(5)]
    shares = share_rows(sources, counts, 3)
    read = [read_slices(share, wanted) for share in shares]
    found = [(i.tolist(), v) for share in read for i, v in share]
    assert list(chain(*(i for i, _ in found))) == ids[kept].tolist()
    np.testing.assert_array_equal(np.concatenate([v for _, v in found]), vectors[kept])
    picked = np.array([0, 3, 17, 39])
    some = np.concatenate([i for i, _ in read_slices(shares[1], wanted, picked)])
    assert some.tolist() == ids[kept][40:80][picked].tolist()


def test_float16_parts_are_read_as_float32_and_part_by_part_equals_the_whole(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    ids, vectors = np.arange(120), random_unit(rng, 120).astype(np.float16)
    table = write_table(tmp_path / "e", ids, vectors, stamp=None)
    parts = list(read_embedding_parts(table, "references"))
    assert [len(part) for part in parts] == [50, 50, 20]
    whole = read_embeddings(table, "references")
    assert whole.vectors.dtype == np.float32
    np.testing.assert_array_equal(whole.vectors, vectors.astype(np.float32))
    np.testing.assert_array_equal(np.concatenate([part.vectors for part in parts]), whole.vectors)
    assert whole.place_ids.tolist() == (ids + 1).tolist()


def test_ids_that_repeat_are_negative_or_missing_are_refused_by_name() -> None:
    sources = fake_sources(3)
    check_ids(np.array([5, 1, 9]), [1, 0, 2], sources, np.array([1, 5, 9]))
    with pytest.raises(
        RunError, match=r"id 7 stands twice, in /t/\S*00000\S* and in /t/\S*00002\S* \(1 repeated"
    ):
        check_ids(np.array([7, 3, 4, 7]), [2, 0, 2], sources, None)
    with pytest.raises(RunError, match=r"id -4 is negative"):
        check_ids(np.array([7, -4]), [1, 1, 0], sources, None)
    with pytest.raises(RunError, match=r"2 of 4 ids to index are not in /t, the first is 2; "):
        check_ids(np.array([1, 9]), [1, 1, 0], sources, np.array([1, 2, 8, 9]))
    for ids in ([3, 4, 3], []):
        with pytest.raises(
            RunError, match=rf"the {len(ids)} ids to index hold {len(set(ids))} different ones"
        ):
            sorted_ids(np.array(ids, dtype=np.int64))


def test_vectors_of_another_width_or_type_are_refused_by_file() -> None:
    sources, good = fake_sources(2), PartCount(3, 16, "float32")
    assert check_vectors(sources, [good, good], STAMP) == 16
    with pytest.raises(
        RunError,
        match=r"/t/\S*00001\S* holds vectors of D=8, float32, where D=16, float32 is wanted",
    ):
        check_vectors(sources, [good, PartCount(3, 8, "float32")], None)
    with pytest.raises(
        RunError, match=r"/t/\S*00000\S* holds vectors of D=16, float16, where D=16, float32"
    ):
        check_vectors(sources, [PartCount(3, 16, "float16")] * 2, STAMP)


def test_embeddings_from_two_checkpoints_are_refused_and_both_values_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    later = dataclasses.replace(STAMP, weights_sha256="w8")
    one = write_table(tmp_path / "a", np.arange(10), random_unit(rng, 10))
    other = write_table(tmp_path / "b", np.arange(10, 20), random_unit(rng, 10), stamp=later)
    unstamped = write_table(tmp_path / "c", np.arange(20, 30), random_unit(rng, 10), stamp=None)
    with pytest.raises(
        RunError,
        match=r"two checkpoints in one index: \S*/a was made with weights_sha256 'w7', \S*/b with 'w8'",
    ):
        open_sources([one, other])
    with pytest.raises(RunError, match=r"\S*/a was made with step 7, \S*/c with None"):
        open_sources([one, unstamped])
    with pytest.raises(RunError, match=r"made with weights_sha256 'w8', but 'w7' is wanted"):
        open_sources([other], STAMP)
    with pytest.raises(RunError, match="holds no published embeddings"):
        open_sources([str(tmp_path / "none")])
    with pytest.raises(RunError, match="no embedding table is given"):
        open_sources([])


def break_part(change: str) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-10])

    def alter(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    changes: dict[str, Callable[[Path], None]] = {
        "cut": cut,
        "altered": alter,
        "removed": Path.unlink,
    }
    return changes[change]


@pytest.mark.parametrize("change", ["cut", "altered", "removed"])
def test_a_part_that_is_cut_altered_or_missing_is_refused_by_name(
    tmp_path: Path, change: str
) -> None:
    rng = np.random.default_rng(0)
    sources, _ = open_sources([write_table(tmp_path / "e", np.arange(100), random_unit(rng, 100))])
    break_part(change)(tmp_path / "e/references/part-00001.parquet")
    shard = started_again(tmp_path)
    if change != "altered":  # bytes in place are seen when the vectors are read
        with pytest.raises(RunError, match=r"e/references/part-00001\.parquet"):
            shard.read_heads(sources, None)
    with pytest.raises(RunError, match=r"e/references/part-00001\.parquet"):
        list(read_slices([RowRange(source, 0, 50) for source in sources], None))


def test_vectors_that_are_not_finite_are_refused_by_file_and_id_where_they_are_to_be_indexed(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    vectors = random_unit(rng, 100)
    vectors[70, 3] = np.nan
    sources, _ = open_sources([write_table(tmp_path / "e", np.arange(100) + 500, vectors)])
    slices = [RowRange(source, 0, 50) for source in sources]
    with pytest.raises(
        RunError, match=r"part-00001\.parquet: the embedding of id 570 is not finite \(1 such\)"
    ):
        list(read_slices(slices, None))
    assert (
        sum(
            len(ids)
            for ids, _ in read_slices([slices[0], RowRange(sources[1], 0, 49)], _without(570))
        )
        == 99
    )


def _without(left_out: int) -> Array:
    return np.array([i for i in range(500, 600) if i != left_out])


def test_a_part_with_other_columns_or_types_is_refused_by_name(tmp_path: Path) -> None:
    ids = np.arange(20)
    table = write_parts(tmp_path / "e", [(ids, np.ones((20, 4), dtype=np.float64))], stamp=None)
    sources, _ = open_sources([table])
    shard = started_again(tmp_path)
    with pytest.raises(
        RunError, match=r"part-00000\.parquet holds vectors of double; float16 or float32 is wanted"
    ):
        shard.read_heads(sources, None)
    with pytest.raises(RunError, match=r"holds vectors of double"):
        read_embeddings(table, "references")
    widths = [(ids, np.ones((20, 4), np.float32)), (ids + 20, np.ones((20, 5), np.float32))]
    with pytest.raises(RunError, match=r"part-00001\.parquet holds D=5, the parts before it 4"):
        read_embeddings(write_parts(tmp_path / "f", widths), "references")


def started_again(tmp_path: Path) -> IndexShard:
    return IndexShard(ShardSetup(str(tmp_path / "index"), 0, 1, 1, use_gpu=False))


def stage(shard: IndexShard, table: str, version: int, count: int, kind: Kind = "flat") -> Staged:
    sources, _ = open_sources([table])
    slices = share_rows(sources, [source.part.rows for source in sources], 1)[0]
    plan, template = plan_index(count, 16, kind=kind), None
    if plan.train_size:
        template = shard.train(
            plan, shard.sample(slices, None, spread_rows(count, plan.train_size, 0))[1]
        )
    return shard.stage(version, slices, None, plan, template, "torch")


def publish_staged(tmp_path: Path, staged: Staged, count: int) -> None:
    info = {**staged.info, "num_shards": 1, "num_vectors": count, "engine": "torch"}
    publish(str(tmp_path / f"index/v={staged.version:04d}"), "index", [staged.part], None, info)


def test_the_ids_of_many_parts_come_in_the_order_of_the_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, vectors = rng.permutation(1000)[:200], random_unit(rng, 200)
    sources, _ = open_sources([write_table(tmp_path / "e", ids, vectors, part_rows=4)])
    wanted = np.sort(ids[rng.random(200) < 0.5])
    counts, kept = started_again(tmp_path).read_heads(sources, wanted)
    assert kept.tolist() == [i for i in ids.tolist() if i in set(wanted.tolist())]
    assert [count.kept for count in counts] == [
        np.isin(ids[s : s + 4], wanted).sum() for s in range(0, 200, 4)
    ]
    assert {count[1:] for count in counts} == {(16, "float32")}


def test_shards_are_spread_over_nodes_unless_the_configuration_says_otherwise() -> None:
    options = shard_options(MiningConfig())
    assert (options["scheduling_strategy"], options["num_gpus"]) == ("SPREAD", 0)
    assert options["concurrency_groups"] == {"build": 1, "search": 2}
    packed = shard_options(
        MiningConfig(shard_placement="DEFAULT", cpus_per_shard=0.5, gpus_per_shard=1)
    )
    assert [packed[key] for key in ("scheduling_strategy", "num_cpus", "num_gpus")] == [
        "DEFAULT",
        0.5,
        1,
    ]
    assert packed["concurrency_groups"] == {"build": 1, "search": 1}


def test_a_folder_that_is_no_version_of_shards_is_an_error_of_that_version_alone(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = random_unit(rng, 60), random_unit(rng, 3)
    staged = stage(
        started_again(tmp_path), write_table(tmp_path / "e", np.arange(60), vectors), 1, 60
    )
    publish_staged(tmp_path, staged, 60)
    VectorIndex.build(vectors, np.arange(60)).save(str(tmp_path / "index/v=0002"))
    shard = started_again(tmp_path)
    assert shard.versions() == [1]
    assert len(shard.search(1, queries, 5)[0]) == 3
    with pytest.raises(
        RunError, match=r"v=0002 holds an index, but no version of shards; remove it"
    ):
        shard.search(2, queries, 5)


@pytest.mark.parametrize("kind", ["flat", "sqfp16", "ivf_sq8", "ivf_rabitq", "hnsw"])
def test_a_shard_that_is_started_again_goes_on_from_the_file_at_every_step(
    tmp_path: Path, kind: Kind
) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = random_unit(rng, 120), random_unit(rng, 9)
    table = write_table(tmp_path / "e", np.arange(120), vectors)
    first = started_again(tmp_path)
    staged = stage(first, table, 4, 120, kind)
    wanted, scores = first.probe(staged, "torch", queries, 5, None)
    if kind == "flat":
        assert wanted.tolist() == sort_everything(queries, vectors, np.arange(120), 5)[0].tolist()
    assert started_again(tmp_path).versions() == []  # what is not published is not there
    assert (
        started_again(tmp_path).probe(staged, "torch", queries, 5, None)[0].tolist()
        == wanted.tolist()
    )
    publish_staged(tmp_path, staged, 120)
    shard = started_again(tmp_path)
    assert shard.versions() == [4]
    shard.activate(4)
    for found, expected in zip(shard.search(4, queries, 5), (wanted, scores), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_search_ends_on_the_version_that_it_began_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, inside, go = np.random.default_rng(0), threading.Event(), threading.Event()
    vectors, queries = random_unit(rng, 100), random_unit(rng, 9)
    shard = started_again(tmp_path)
    for version in (1, 2):
        table = write_table(tmp_path / f"e{version}", np.arange(100) + 1000 * version, vectors)
        staged = stage(shard, table, version, 100)
        publish_staged(tmp_path, staged, 100)
        if version == 1:
            shard.activate(1)
    search = VectorIndex.search

    def slow_search(index: VectorIndex, queries: Array, k: int) -> Found:
        inside.set()
        assert go.wait(30)
        return search(index, queries, k)

    monkeypatch.setattr(VectorIndex, "search", slow_search)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(shard.search, 1, queries, 5)
        assert inside.wait(30)
        shard.activate(2)
        assert shard.versions() == [1, 2]  # until every shard has the new one
        shard.retire([2])
        go.set()
        assert (answer.result()[0] // 1000 == 1).all()
    assert shard.versions() == [2]
    assert (shard.search(2, queries, 5)[0] // 1000 == 2).all()


def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    shard = IndexShard(ShardSetup(str(tmp_path / "index"), 0, 1, 1, use_gpu=True))
    with pytest.raises(RunError, match="gpus_per_shard=0"):
        shard.require_gpu()
    table = write_table(tmp_path / "e", np.arange(50), random_unit(np.random.default_rng(0), 50))
    with pytest.raises(RunError, match="gpus_per_shard=0"):
        stage(shard, table, 1, 50)


def test_a_version_that_was_loaded_at_the_start_is_freed_when_it_retires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = RunError("a version, as good as any")
    freed = weakref.ref(held)
    box = [{1: held}]
    monkeypatch.setattr(IndexShard, "_load_published", lambda self: box.pop())
    shard = IndexShard(ShardSetup(str(tmp_path / "index"), 0, 1, 1, use_gpu=False))
    with pytest.raises(RunError, match="as good as any"):
        shard.search(1, np.zeros((1, 2), np.float32), 1)
    shard.retire([])
    del held
    gc.collect()
    assert freed() is None
