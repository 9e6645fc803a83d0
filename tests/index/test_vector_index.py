from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s4g_ray.data.area import Area
from s4g_ray.errors import RunError
from s4g_ray.index.faiss_library import faiss, set_num_threads
from s4g_ray.index.plan import IndexPlan, Kind, plan_index
from s4g_ray.index.top_k import order_ties
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage.manifest import open_published, publish, write_part
from tests.support.search_oracle import KINDS, brute_force, clustered, data, recall


@pytest.mark.parametrize("kind", ["auto", "flat"])
@pytest.mark.parametrize("engine", ["auto", "faiss", "torch", "torch_bf16"])
@pytest.mark.parametrize("k", [1, 9, 200])
def test_search_equals_brute_force(kind: Kind, engine: Any, k: int) -> None:
    vectors, ids, queries = data()
    index = VectorIndex.build(vectors, ids, kind=kind, engine=engine, num_threads=2)
    found, scores = index.search(queries, k)
    wanted, wanted_scores = brute_force(vectors, ids, queries, k)
    assert found.tolist() == wanted
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)


def test_float16_codes_score_nearly_the_same() -> None:
    vectors, ids, queries = data()
    index = VectorIndex.build(vectors, ids, kind="sqfp16")
    found, scores = index.search(queries, 10)
    wanted, wanted_scores = brute_force(vectors, ids, queries, 10)
    np.testing.assert_allclose(scores, wanted_scores, atol=2e-3)
    assert recall(found, wanted) > 0.97


@pytest.mark.parametrize(
    ("kind", "least", "error"),
    [("ivf_sq8", 0.95, 0.01), ("ivf_rabitq", 0.9, 0.05), ("hnsw", 0.95, 1e-5)],
)
def test_approximate_kinds_find_nearly_what_brute_force_finds(
    kind: Kind, least: float, error: float
) -> None:
    vectors = clustered(4000)
    queries = clustered(30, seed=1)
    ids = np.arange(4000)[::-1] * 3
    index = VectorIndex.build(vectors, ids, kind=kind, num_threads=2)
    found, scores = index.search(queries, 20)
    assert recall(found, brute_force(vectors, ids, queries, 20)[0]) >= least
    rows = (ids[0] - found) // 3
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = np.einsum(
        "mkd,md->mk", unit[rows], queries / np.linalg.norm(queries, axis=1, keepdims=True)
    )
    np.testing.assert_allclose(scores, cosine, atol=error)


@pytest.mark.parametrize("kind", ["ivf_sq8", "ivf_rabitq", "hnsw"])
def test_a_higher_search_effort_finds_more(kind: Kind) -> None:
    vectors = np.random.default_rng(0).normal(size=(3000, 32))
    queries = clustered(40, seed=1)
    index = VectorIndex.build(vectors, np.arange(3000), kind=kind)
    wanted = brute_force(vectors, np.arange(3000), queries, 10)[0]
    found = []
    for effort in (1, 60):
        index.effort = effort
        assert index.effort == effort
        found.append(recall(index.search(queries, 10)[0], wanted))
    assert found[0] + 0.1 < found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_k_is_always_found_best_first_and_no_id_twice(kind: Kind) -> None:
    vectors = clustered(700)
    queries = clustered(9, seed=1)
    index = VectorIndex.build(vectors, np.arange(700) + 5, kind=kind)
    if index.effort is not None:
        index.effort = 1
    for k in (1, 300, 700):
        ids, scores = index.search(queries, k)
        assert ids.min() >= 5
        assert all(len(set(row)) == k for row in ids.tolist())
        assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_are_ordered_by_id(kind: Kind) -> None:
    distinct = clustered(10)
    rng = np.random.default_rng(1)
    vectors = distinct[rng.integers(0, 10, 400)]
    ids = rng.permutation(400)
    found, scores = VectorIndex.build(vectors, ids, kind=kind).search(distinct, 400)
    tied = scores[:, 1:] == scores[:, :-1]
    assert tied.mean() > 0.5
    assert (found[:, 1:] > found[:, :-1])[tied].all()


def test_ties_are_ordered_and_all_others_stay() -> None:
    ids = np.array([[5, 3, 4, 1], [9, 8, 7, 6]])
    scores = np.array([[0.9, 0.5, 0.5, 0.5], [4, 3, 2, 1]], np.float32)
    assert order_ties(ids, scores)[0].tolist() == [[5, 1, 3, 4], [9, 8, 7, 6]]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_that_clone_one_template_score_as_one_index_does(kind: Kind) -> None:
    vectors = clustered(3000)
    queries = clustered(20, seed=1)
    ids = np.random.default_rng(0).permutation(3000)
    plan = IndexPlan(**json.loads(json.dumps(asdict(plan_index(3000, 32, kind=kind, nprobe=64)))))
    template = VectorIndex.template(plan, vectors[: plan.train_size])
    whole, *shards = (VectorIndex.empty(plan, template) for _ in range(3))
    whole.add(vectors, ids)
    for shard, start in zip(shards, (0, 1700), strict=True):
        end = 1700 if start == 0 else 3000
        for block in range(start, end, 400):
            stop = min(block + 400, end)
            shard.add(vectors[block:stop], ids[block:stop])
    assert [len(shard) for shard in shards] == [1700, 1300]
    found = [shard.search(queries, 15) for shard in shards]
    merged_ids = np.concatenate([f[0] for f in found], 1)
    merged = np.concatenate([f[1] for f in found], 1)
    order = np.argsort(-merged, axis=1, kind="stable")[:, :15]
    wanted_ids, wanted = whole.search(queries, 15)
    if kind != "hnsw":  # each shard has a graph of its own
        np.testing.assert_allclose(np.take_along_axis(merged, order, 1), wanted, atol=1e-5)
        assert np.mean(np.take_along_axis(merged_ids, order, 1) == wanted_ids) > 0.99
    assert (np.take_along_axis(merged, order, 1)[:, 0] >= wanted[:, 0] - 1e-5).mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_keeps_the_answers_and_more_can_be_added(
    kind: Kind, tmp_path: Path
) -> None:
    vectors, ids, queries = data()
    index = VectorIndex.build(vectors, ids, kind=kind)
    if index.effort is not None:
        index.effort = 3
    index.save(str(tmp_path / "i"))
    again = VectorIndex.load(str(tmp_path / "i"))
    assert (again.kind, len(again), again.dim, again.effort) == (kind, 200, 24, index.effort)
    assert again.info == index.info
    for before, after in zip(index.search(queries, 5), again.search(queries, 5), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    again.add(queries[:1], np.array([77_777]))
    assert again.search(queries[:1], 1)[0].tolist() == [[77_777]]
    assert VectorIndex.load(str(tmp_path / "i")).search(queries[:1], 1)[0].tolist() != [[77_777]]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_several_shards_live_in_one_folder_and_altered_ones_are_refused(
    kind: Kind, tmp_path: Path
) -> None:
    vectors, ids, queries = data()
    folder = str(tmp_path / "v=0001")
    plan = plan_index(200, 24, kind=kind)
    template = VectorIndex.template(plan, vectors)
    parts = []
    for shard in range(2):
        index = VectorIndex.empty(plan, template)
        index.add(vectors[shard::2], ids[shard::2])
        parts.append(index.save_part(folder, f"shard-{shard}.bin"))
    manifest = publish(folder, "index", parts, info=index.info)
    info = open_published(folder, "index").info
    assert info == manifest.info
    second = VectorIndex.load_part(folder, parts[1], info)
    np.testing.assert_array_equal(second.search(queries, 3)[0], index.search(queries, 3)[0])
    path = tmp_path / "v=0001/shard-1.bin"
    good = path.read_bytes()
    for bad in (good[:-1], good[:100] + bytes([good[100] ^ 1]) + good[101:]):
        path.write_bytes(bad)
        with pytest.raises(
            RunError, match=r"shard-1\.bin differs from the published file.*remove .* and resume"
        ):
            VectorIndex.load_part(folder, parts[1], info)
    path.unlink()
    with pytest.raises(RunError, match=r"shard-1\.bin is in the manifest but missing"):
        VectorIndex.load_part(folder, parts[1], info)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_holds_no_index_of_the_kind_is_refused(kind: Kind, tmp_path: Path) -> None:
    vectors, ids, _ = data()
    index = VectorIndex.build(vectors, ids, kind=kind)
    for content, rows in ((b"x" * 1600 + b"no index" * 9, 200), (b"short", 200)):
        part = write_part(str(tmp_path), "a.bin", content, rows)
        with pytest.raises(
            RunError, match=rf"a\.bin holds no {kind} index of 200 vectors .*remove .* and resume"
        ):
            VectorIndex.load_part(str(tmp_path), part, index.info)


def test_vectors_ids_and_queries_that_do_not_fit_are_refused() -> None:
    vectors, ids, queries = data()
    index = VectorIndex.build(vectors, ids)
    with pytest.raises(ValueError, match=r"k=201 is not within 1\.\.200"):
        index.search(queries, 201)
    with pytest.raises(ValueError, match="do not fit an index of D=24"):
        index.search(queries[:, :5], 1)
    with pytest.raises(ValueError, match="1 vectors are not finite"):
        index.search(np.array([[np.nan] * 24]), 1)
    with pytest.raises(ValueError, match="vectors of int64 are not float16, float32 or float64"):
        index.search(np.ones((1, 24), np.int64), 1)
    for bad in (np.zeros(200, dtype=np.int64), ids - 10_000, ids[:5], ids.astype(float)):
        with pytest.raises(ValueError, match="ids"):
            VectorIndex.build(vectors, bad)
    vectors[3, 3] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        VectorIndex.build(vectors, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_is_refused_leaves_the_index_as_it_was(kind: Kind) -> None:
    vectors, ids, queries = data()
    index = VectorIndex.build(vectors, ids, kind=kind)
    before = index.search(queries, 200)
    extra = np.random.default_rng(1).normal(size=(3, 24))
    new = np.array([10_001, 10_002, 10_003])
    beyond = extra.copy()
    beyond[2, 0] = 1e39  # finite, but not as float32
    for bad, bad_ids, message in (
        (extra[:, :5], new, r"vectors\[3, 5\] do not fit an index of D=24"),
        (extra.astype(np.int32), new, "vectors of int32"),
        (beyond, new, "not finite; the first is row 2"),
        (extra, -new, "not negative"),
        (extra, new[[0, 1, 0]], "unique"),
        (extra, new[:2], "one whole number for each of 3 vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            index.add(bad, bad_ids)
    assert len(index) == 200
    np.testing.assert_array_equal(index.search(queries, 200)[0], before[0])


def test_an_id_added_by_two_calls_is_found_when_sealing() -> None:
    vectors, ids, queries = data()
    index = VectorIndex.empty(plan_index(200, 24))
    index.add(vectors[:100], ids[:100])
    index.add(vectors[100:], np.concatenate([ids[100:199], ids[:1]]))
    for use in (
        index.seal,
        lambda: index.search(queries, 1),
        lambda: index.save_part("unused", "unused"),
    ):
        with pytest.raises(
            ValueError, match=f"1 ids were added more than once, {ids[0]} among them"
        ):
            use()
    assert index.remove(ids[:1]) == 2
    index.add(vectors[:1], ids[:1])
    assert index.search(vectors[:1], 1)[0].tolist() == [[ids[0]]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_emptied_index_takes_vectors_with_coordinates_alone_if_it_had_them(
    kind: Kind, tmp_path: Path
) -> None:
    vectors, ids, _ = data()
    places = np.zeros((len(ids), 2))
    index = VectorIndex.build(vectors, ids, kind=kind, coordinates=places)
    index.remove(ids)
    with pytest.raises(ValueError, match="the vectors of this index have coordinates"):
        index.add(vectors[:50], ids[:50])
    index.add(vectors[:50], ids[:50], places[:50])
    index.save(str(tmp_path))
    again = VectorIndex.load(str(tmp_path))
    assert len(again) == 50
    assert again.count_allowed(area=Area.circle(0, 0, 1.0)) == 50


def test_ids_beyond_int64_are_refused() -> None:
    vectors, _, _ = data()
    ids: Any = np.arange(len(vectors), dtype=np.uint64) + 2**63
    with pytest.raises(ValueError, match="above 9223372036854775807"):
        VectorIndex.build(vectors, ids)


def test_ids_that_a_cast_would_change_are_refused_and_remove_nothing() -> None:
    vectors, ids, _ = data()
    index = VectorIndex.build(vectors, ids)
    fractions: Any = ids[:2] + 0.5
    for use in (index.remove, index.holds, lambda some: index.replace(vectors[:2], some)):
        with pytest.raises(ValueError, match="whole number"):
            use(fractions)
    assert len(index) == len(ids)
    nothing: Any = []
    assert index.remove(nothing) == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_adding_in_blocks_or_other_types_gives_the_same_answers_as_one_call(
    kind: Kind, dtype: type
) -> None:
    vectors, ids, queries = data()
    vectors = vectors.astype(np.float16).astype(dtype)
    plan = plan_index(200, 24, kind=kind)
    template = VectorIndex.template(plan, vectors)
    whole = VectorIndex.empty(plan, template)
    blocks = VectorIndex.empty(plan, template)
    whole.add(vectors.astype(np.float32), ids)
    for start in range(0, 200, 37):
        blocks.add(vectors[start : start + 37], ids[start : start + 37])
    np.testing.assert_array_equal(whole.search(queries, 10)[0], blocks.search(queries, 10)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_the_same_however_many_threads_build_it(kind: Kind, tmp_path: Path) -> None:
    vectors = clustered(3000)
    built = []
    before = set_num_threads(None)
    for name, threads in (("one", 1), ("four", 4), ("again", 4)):
        set_num_threads(threads)
        VectorIndex.build(vectors, np.arange(3000), kind=kind).save(str(tmp_path / name))
        built.append((tmp_path / name / "index.bin").read_bytes())
    assert faiss.omp_get_max_threads() == 4
    set_num_threads(before)
    assert built[0] == built[1] == built[2]


def test_templates_and_search_efforts_that_do_not_fit_are_refused() -> None:
    plan = plan_index(10_000, 24, kind="ivf_sq8")
    with pytest.raises(ValueError, match="needs the template that its shards share"):
        VectorIndex.empty(plan)
    with pytest.raises(
        ValueError, match=rf"50 vectors are too few to train {plan.num_lists} lists on; give 10000"
    ):
        VectorIndex.template(plan, data()[0][:50])
    with pytest.raises(ValueError, match="do not fit an index of D=24"):
        VectorIndex.template(plan, np.ones((10_000, 3)))
    vectors, ids, _ = data()
    exact = VectorIndex.build(vectors, ids)
    assert exact.effort is None
    with pytest.raises(ValueError, match="flat takes none"):
        exact.effort = 5
    with pytest.raises(ValueError, match="effort=0: hnsw takes 1 or more"):
        VectorIndex.build(vectors, ids, kind="hnsw").effort = 0


def test_a_plan_states_the_memory_that_an_index_has() -> None:
    count = 20_000
    vectors = clustered(20_000, dim=48)
    for kind, memory_gb in (*((kind, None) for kind in KINDS), ("ivf_rabitq", 0.0015)):
        plan = plan_index(count, 48, kind=kind, memory_gb=memory_gb)
        template = VectorIndex.template(plan, vectors[: plan.train_size])
        index = VectorIndex.empty(plan, template)
        index.add(vectors, np.arange(count))
        file = io.BytesIO()
        index.store.write(file)
        size = (len(file.getvalue()) + 8 * count) / 1e9
        assert size <= plan.memory_gb * 1.03, plan
        assert plan.memory_gb <= size * 1.55, plan
    assert plan.bits == 1
