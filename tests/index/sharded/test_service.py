from __future__ import annotations

import dataclasses
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from s4g_ray.arrays import spread_rows
from s4g_ray.errors import RunError
from s4g_ray.index.plan import plan_index
from s4g_ray.index.sharded.build import VERSIONS_KEPT
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.index.sharded.sharding import deal_rows, open_sources, read_ranges
from s4g_ray.index.vector_index import VectorIndex
from tests.support.embedding_tables import (
    STAMP,
    Array,
    break_part,
    random_unit,
    sort_everything,
    write_parts,
    write_table,
)
from tests.support.index_services import Collection, K, Started, config, kill_shard

pytestmark = pytest.mark.cluster


def test_one_two_and_three_shards_answer_as_sorting_everything_does(
    started: Started, collection: Collection, queries: Array, tmp_path: Path
) -> None:
    kept = np.sort(np.random.default_rng(1).choice(430, 301, replace=False))
    wanted, wanted_scores = sort_everything(
        queries, collection.vectors[kept], collection.ids[kept], K
    )
    tight = {"index_kind": "flat", "index_memory_gb": 2.5e-5}  # 301 vectors of 16 float32 and an id
    with (
        IndexService(config(num_shards=1), str(tmp_path / "1")) as one,
        IndexService(config(num_shards=3, **tight), str(tmp_path / "3"), engine="faiss") as three,
    ):
        for shards, service, engine in (
            (1, one, "torch"),
            (2, started.service, "torch"),
            (3, three, "faiss"),
        ):
            report = service.build(
                10, collection.tables, collection.ids[kept], sample=queries, k=K, stamp=STAMP
            )
            found, scores = service.search(10, queries, K)
            assert found.tolist() == wanted.tolist()
            np.testing.assert_allclose(scores, wanted_scores, atol=1e-6)
            assert (report.num_shards, report.num_vectors, report.kind, report.recall) == (
                shards,
                301,
                "flat",
                1.0,
            )
            assert (report.engine, service.engine) == (engine, engine)
            assert service.report(10, stamp=STAMP) == report
            assert service.report(10, stamp=dataclasses.replace(STAMP, step=8)) is None
            shuffled = collection.ids[kept][::-1]
            assert service.report(10, ids=shuffled) == report
            assert service.report(10, ids=shuffled[1:]) is None
            every, _ = service.search(10, queries, 301)  # more than any one shard holds
            assert np.sort(every, axis=1).tolist() == [sorted(collection.ids[kept].tolist())] * len(
                queries
            )
        with pytest.raises(
            RunError, match=r"430 vectors of D=16 need .* memory_gb=2.5e-05; raise mining.index_"
        ):
            three.build(11, collection.tables, k=K)
        np.testing.assert_array_equal(three.search(10, queries, K)[0], wanted)


def ask_from_a_task(client: Any, queries: Array) -> Any:
    return client.search(20, queries, K)[0]


def test_searches_are_answered_while_versions_are_built_and_the_newest_is_in_service(
    started: Started, collection: Collection, queries: Array
) -> None:
    service = started.service
    halves = {20: slice(0, 230), 21: slice(230, 430), 22: slice(0, 230)}
    wanted = {
        v: sort_everything(queries, collection.vectors[rows], collection.ids[rows], K)[0].tolist()
        for v, rows in halves.items()
    }
    service.build(20, collection.tables[0], k=K)
    answers: list[bool] = []
    ends: list[str] = []

    def ask() -> None:
        try:
            while True:
                answers.append(service.search(20, queries, K)[0].tolist() == wanted[20])
        except RunError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    task = ray.remote(num_cpus=0)(ask_from_a_task).remote(
        pickle.loads(pickle.dumps(service.client)), queries
    )
    assert ray.get(task).tolist() == wanted[20]
    before = len(answers)
    assert service.build(21, collection.tables[1], sample=queries, k=K).recall == 1.0
    assert service.search(21, queries, K)[0].tolist() == wanted[21]
    for thread in threads:
        thread.join()
    assert len(answers) > before
    assert all(answers)
    assert all("version 20 of" in end and "is not in service (in serv" in end for end in ends)

    service.build(22, collection.tables[0], k=K)
    folders = sorted(path.name for path in started.folder.iterdir())
    assert folders == ["v=0021", "v=0022"]
    assert len(folders) == VERSIONS_KEPT
    assert service.search(22, queries, K)[0].tolist() == wanted[22]
    with pytest.raises(
        RunError, match=r"version 21 of \S+ is not in service \(in service: 22\); shards hold"
    ):
        service.search(21, queries, K)
    assert service.report(21) is None

    service.build(22, collection.tables[1], k=K)  # again, from other embeddings
    assert service.search(22, queries, K)[0].tolist() == wanted[21]
    service.build(21, collection.tables[0], k=K)  # the course that led to 22 is left
    assert sorted(path.name for path in started.folder.iterdir()) == ["v=0021"]
    assert service.search(21, queries, K)[0].tolist() == wanted[22]


def write_bad_tables(folder: Path) -> None:
    """Publish tables of 60 references, each with another defect."""
    rng = np.random.default_rng(2)
    fresh = random_unit(rng, 60)
    ids = np.arange(60) + 9000
    later_stamp = dataclasses.replace(STAMP, weights_sha256="w8")
    write_table(folder / "later", ids, fresh, stamp=later_stamp)
    write_parts(folder / "narrow", [(ids, fresh[:, :8].copy())])
    write_parts(folder / "half", [(ids, fresh.astype(np.float16))])
    parts = [(ids, fresh), (ids + 100, fresh[:, :8].copy())]
    write_parts(folder / "mixed", parts, stamp=None)
    fresh[50] = np.inf
    write_table(folder / "infinite", ids, fresh)
    write_table(folder / "altered", ids, random_unit(rng, 60))
    break_part("altered")(folder / "altered/references/part-00001.parquet")
    write_table(folder / "cut", ids, random_unit(rng, 60))
    break_part("cut")(folder / "cut/references/part-00001.parquet")


Refused = tuple[str | list[str], dict[str, Any], str]  # tables, arguments of build, message


def refused_builds(folder: Path, collection: Collection, queries: Array) -> list[Refused]:
    """List builds that must be refused; folder holds the tables of write_bad_tables."""
    first, second = collection.tables
    unknown = np.array([*collection.ids[:5], 20_000, 20_001])
    return [
        (
            [first, f"{folder}/later"],
            {},
            r"two checkpoints in one index: \S*/a was made with weights_sha256 'w7',"
            r" \S*/later with 'w8'",
        ),
        (
            f"{folder}/later",
            {"stamp": STAMP},
            r"/later: made with weights_sha256 'w8', but 'w7' is wanted",
        ),
        (
            f"{folder}/narrow",
            {},
            r"narrow/references/part-00000.parquet holds vectors of D=8, float32, where D=16,"
            r" float32",
        ),
        (
            f"{folder}/half",
            {},
            r"half/references/part-00000.parquet holds vectors of D=16, float16, where D=16,"
            r" float32",
        ),
        (f"{folder}/mixed", {}, r"mixed/references/part-00001.parquet holds vectors of D=8"),
        (
            f"{folder}/infinite",
            {},
            r"infinite/references/part-00001.parquet: the embedding of id 9050 is not finite",
        ),
        (
            f"{folder}/altered",
            {},
            r"altered/references/part-00001.parquet differs from the published file:"
            r" cut short or altered",
        ),
        (
            f"{folder}/cut",
            {},
            r"cut/references/part-00001.parquet differs from the published file:"
            r" cut short or altered",
        ),
        (
            [first, second, first],
            {},
            r"id \d+ occurs twice, in \S*/a/references/part-\S+ and in \S*/a/\S+ \(230 repeated",
        ),
        (first, {"ids": unknown}, r"2 of 7 ids to index are not in \S*/a, the first is 20000"),
        (first, {"ids": np.array([1, 1])}, "the 2 ids to index hold 1 different ones"),
        (
            first,
            {"ids": collection.ids[:1], "k": 1},
            r"1 reference cannot fill mining.num_shards=2; lower it",
        ),
        (first, {"k": 231}, r"k=231 is not within 1\.\.230, the number of references to index"),
        (
            first,
            {"sample": queries[:, :5]},
            r"the sample of queries\[40, 5\] does not fit embeddings of D=16",
        ),
        (f"{folder}/none", {}, r"/none holds no published embeddings"),
    ]


def test_a_build_that_is_refused_leaves_the_versions_in_service(
    started: Started, collection: Collection, queries: Array, tmp_path: Path
) -> None:
    service = started.service
    service.build(30, collection.tables, k=K)
    before = service.search(30, queries, K)
    folders = sorted(path.name for path in started.folder.iterdir())
    write_bad_tables(tmp_path)
    for tables, keywords, message in refused_builds(tmp_path, collection, queries):
        with pytest.raises(RunError, match=message):
            service.build(31, tables, **{"k": K, **keywords})
        assert service.report(31) is None
        assert sorted(path.name for path in started.folder.iterdir()) == folders
    after = service.search(30, queries, K)
    np.testing.assert_array_equal(after[0], before[0])
    with pytest.raises(RunError, match=r"k=431 is not within 1\.\.430, the size of version 30"):
        service.search(30, queries, 431)
    with pytest.raises(RunError, match=r"k=431 is not within 1\.\.430, the size of version 30"):
        service.search_partial(30, queries, 431)
    for bad in (queries[:, :5], np.full((2, 16), np.nan, np.float32)):
        with pytest.raises(RunError, match=r"index shard 0: .*(do not fit|not finite)"):
            service.search(30, bad, K)
        with pytest.raises(RunError, match=r"index shard 0: .*(do not fit|not finite)"):
            service.search_partial(30, bad, K)
    assert service.build(31, collection.tables, sample=queries, k=K).recall == 1.0


def test_a_shard_that_dies_answers_again_from_its_file_and_a_damaged_one_is_named(
    started: Started, collection: Collection, queries: Array
) -> None:
    service = started.service
    service.build(40, collection.tables, k=K)
    wanted, scores = service.search(40, queries, K)
    kill_shard(service.client.shards[1])
    again, again_scores = service.search(40, queries, K)
    np.testing.assert_array_equal(again, wanted)
    np.testing.assert_array_equal(again_scores, scores)
    assert service.is_alive()

    break_part("altered")(started.folder / "v=0040/shard-00001.faiss")
    kill_shard(service.client.shards[1])
    with pytest.raises(
        RunError,
        match=r"index shard 1: \S*/v=0040/shard-00001.faiss differs from the published file",
    ):
        service.search(40, queries, K)
    assert service.report(40) is None
    partial = service.search_partial(40, queries, K)
    sources, _ = open_sources(collection.tables)
    share = deal_rows(sources, [[source.part.rows] for source in sources], 2)[0]
    held = np.isin(collection.ids, np.concatenate([ids for ids, _ in read_ranges(share, None)]))
    exact, _ = sort_everything(queries, collection.vectors[held], collection.ids[held], K)
    assert (partial.ids.tolist(), partial.missing_shards) == (exact.tolist(), (1,))
    with pytest.raises(RunError, match=r"version 99 of .* is not in service"):
        service.search_partial(99, queries, K)
    service.build(41, collection.tables, k=K)
    np.testing.assert_array_equal(service.search(41, queries, K)[0], wanted)
    assert service.search_partial(41, queries, K).missing_shards == ()


def test_a_version_of_other_shards_or_another_kind_is_built_again_and_its_engine_is_adopted(
    ray_cluster: None, collection: Collection, queries: Array, tmp_path: Path
) -> None:
    wanted, _ = sort_everything(queries, collection.vectors, collection.ids, K)
    free = {"exact_engine": "auto"}
    folder = str(tmp_path / "index")
    with IndexService(config(num_shards=1), folder) as one:
        one.build(60, collection.tables, sample=queries, k=K)
    with IndexService(config(num_shards=2, **free), folder, engine="torch_bf16") as two:
        assert two.report(60) is None
        with pytest.raises(RunError, match=r"v=0060 has 1 shard, but mining.num_shards=2"):
            two.search(60, queries, K)
        assert two.build(60, collection.tables, sample=queries, k=K).num_shards == 2
        assert two.search(60, queries, K)[0].tolist() == wanted.tolist()
    with IndexService(config(num_shards="auto", **free), folder) as again:  # 2, as it is there
        report = again.report(60)
        assert report is not None
        assert {report.engine, again.engine} == {"torch_bf16"}
        again._cfg = config(index_kind="sqfp16")
        assert again.report(60) is None


def test_search_effort_is_raised_until_recall_suffices_and_low_recall_is_refused(
    started: Started, collection: Collection, tmp_path: Path
) -> None:
    """Shards share the cells, so they answer as one index of the same cells does."""
    rng = np.random.default_rng(8)
    ids = rng.permutation(20_000)[:12_000]
    vectors = random_unit(rng, 12_000)
    queries = random_unit(rng, 50)
    table = write_table(tmp_path / "e", ids, vectors, part_rows=1000)
    started.service.build(50, collection.tables, k=K)
    wrong_count = r"v=0050 has 2 shards, but mining.num_shards=1; set that to 2, or remove"
    low_effort = config(num_shards=1, index_kind="ivf_sq8", nprobe=1, exact_engine="auto")
    with IndexService(low_effort, str(started.folder)) as single:
        with pytest.raises(RunError, match=wrong_count):
            single.search(50, queries, K)
        with pytest.raises(
            RunError,
            match=r"recall@12 of the ivf_sq8 index at nprobe=1 is 0\.\d+ .*, below .*=0\.9",
        ):
            single.build(51, table, sample=queries, k=K)
        # measured, and kept although the build failed
        assert single.engine in ("faiss", "torch", "torch_bf16")
    with IndexService(config(index_kind="ivf_sq8", min_recall=0.98), str(started.folder)) as other:
        exact, _ = other.search(50, collection.vectors[:5], 1)  # built by an earlier service
        assert exact[:, 0].tolist() == collection.ids[:5].tolist()
        assert other.report(51) is None
        report = other.build(51, table, sample=queries, k=K)
        plan = plan_index(12_000, 16, kind="ivf_sq8")
        assert report.effort is not None
        assert plan.nprobe < report.effort <= plan.num_lists
        found, scores = other.search(51, queries, K)
        wanted, _ = sort_everything(queries, vectors, ids, K)
        recall = np.mean(
            [len(set(a) & set(b)) / K for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]
        )
        assert report.recall == pytest.approx(recall)
        assert recall >= 0.98
        one = VectorIndex.empty(
            plan, VectorIndex.template(plan, vectors[spread_rows(12_000, plan.train_size, 0)])
        )
        one.add(vectors, ids)
        one.effort = report.effort
        np.testing.assert_array_equal(found, one.search(queries, K)[0])
        kill_shard(other.client.shards[1])
        # the restarted shard searches with the search effort of the manifest
        np.testing.assert_array_equal(other.search(51, queries, K)[1], scores)

        kill_shard(other.client.shards[0], no_restart=True)
        with pytest.raises(RunError, match="index shard 0 is dead"):
            other.search(51, queries, K)
        assert other.search_partial(51, queries, K).missing_shards == (0,)
        with pytest.raises(RunError, match="index shard 0 is dead"):
            other.build(52, collection.tables, k=K)
