from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray

from s4g_ray.data.area import Area
from s4g_ray.errors import RunError
from s4g_ray.index.sharded.requests import Coordinates
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.storage.manifest import open_published
from tests.support.embedding_tables import Array, random_unit, sort_everything
from tests.support.index_services import Collection, K, Started, config

pytestmark = pytest.mark.cluster


def test_a_search_is_restricted_to_ids_and_to_an_area_on_all_shards(
    started: Started, collection: Collection, queries: Array
) -> None:
    service = started.service
    rng = np.random.default_rng(3)
    order = np.argsort(collection.ids)
    lat = rng.uniform(-60, 60, 430)
    lon = rng.uniform(-180, 180, 430)
    places = Coordinates(collection.ids[order], lat[order], lon[order])
    service.build(45, collection.tables, coordinates=places, k=K)
    inside = (np.abs(lat) < 30) & (np.abs(lon) < 90)
    ids = np.sort(rng.choice(collection.ids, 200, replace=False))
    for allowed, options in (
        (np.isin(collection.ids, ids), {"ids": ids}),
        (inside, {"area": Area.bounds(-90, -30, 90, 30)}),
        (
            inside & np.isin(collection.ids, ids),
            {"ids": ids, "area": Area.bounds(-90, -30, 90, 30)},
        ),
    ):
        found, scores = service.search(45, queries, K, **options)
        wanted, wanted_scores = sort_everything(
            queries, collection.vectors[allowed], collection.ids[allowed], K
        )
        assert found.tolist() == wanted.tolist()
        np.testing.assert_allclose(scores, wanted_scores, atol=1e-6)
    few, few_scores = service.search(45, queries, K, ids=ids[:3])
    assert (few[:, 3:] == -1).all()
    assert np.isneginf(few_scores[:, 3:]).all()
    assert np.sort(few[:, :3], axis=1).tolist() == [ids[:3].tolist()] * len(queries)
    two = Coordinates(np.arange(2), np.zeros(2), np.zeros(2))
    with pytest.raises(RunError, match=r"references have no coordinates, \d+ among them"):
        service.build(46, collection.tables, coordinates=two, k=K)
    assert service.search(45, queries, 1)[0].shape == (len(queries), 1)


def test_vectors_are_added_replaced_and_removed_as_if_the_version_was_built_of_them(
    started: Started, collection: Collection, queries: Array
) -> None:
    service = started.service
    service.build(70, collection.tables[0], k=K)
    held = dict(zip(collection.ids[:230].tolist(), collection.vectors[:230], strict=True))
    fresh = random_unit(np.random.default_rng(4), 60)

    def check(version: int) -> None:
        ids = np.array(list(held))
        wanted, scores = sort_everything(queries, np.stack(list(held.values())), ids, K)
        found, found_scores = service.search(version, queries, K)
        assert found.tolist() == wanted.tolist()
        np.testing.assert_allclose(found_scores, scores, atol=1e-6)

    added = np.arange(9000, 9040)
    report = service.add(71, fresh[:40], added)
    held.update(zip(added.tolist(), fresh[:40], strict=True))
    assert (report.num_vectors, report.version, report.recall) == (270, 71, None)
    check(71)
    other = added[:7]
    service.replace(72, fresh[40:47], other)
    held.update(zip(other.tolist(), fresh[40:47], strict=True))
    check(72)
    ray.kill(service.client.shards[0], no_restart=False)
    check(72)  # from the new version's files
    one = next(iter(held))  # the file of the shard that does not hold it is the same
    assert service.remove(73, np.array([one])).num_vectors == 269
    del held[one]
    check(73)
    digests = [
        {part.sha256 for part in open_published(f"{started.folder}/v=00{v}", "index").parts}
        for v in (72, 73)
    ]
    assert len(digests[0] & digests[1]) == 1
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: service.add(74, fresh[:1], added[:1]), r"1 of 1 ids to add are in version 73 alr"),
        (lambda: service.remove(74, np.array([1, 8_999])), r"\d of 2 ids are not in version 73, "),
        (lambda: service.remove(74, np.array([one, one])), r"2 ids hold 1 different ones"),
        (lambda: service.remove(74, np.array([one + 0.5])), r"no list of whole numbers"),
        (lambda: service.add(74, fresh[:1], np.array([1, 2])), r"1 rows are given for 2 ids; giv"),
        (lambda: service.remove(73, added[:1]), r"version 73 is not after 73, the newest of"),
        (lambda: service.add(74, fresh[:1, :3], np.array([1])), r"index shard \d: .* D=16"),
        (lambda: service.remove(74, np.array(list(held))), r"all 269 vectors would be removed"),
    ]
    for wrong, message in refused:
        with pytest.raises(RunError, match=message):
            wrong()
        check(73)
    assert sorted(path.name for path in started.folder.iterdir()) == ["v=0072", "v=0073"]


def test_shards_are_counted_and_ask_for_the_memory_that_is_planned(
    ray_cluster: None, collection: Collection, queries: Array, tmp_path: Path
) -> None:
    cfg = config(num_shards="auto", index_kind="ivf_sq8", min_recall=0.5)
    with IndexService(cfg, str(tmp_path / "i"), num_vectors=430, dim=16) as service:
        assert service.plan is not None
        planned = f"{service.plan.peak_gb:.3g} GB of memory"
        assert service.client.demand == f"0 CPUs and {planned}"
        regions = np.array(["north", "south"] * 20)
        report = service.build(1, collection.tables, sample=queries, regions=regions, k=K)
        assert (report.num_shards, report.reason) == (1, service.plan.reason)
        assert report.recall is not None
        assert report.recall_low is not None
        assert report.recall_low <= report.recall
        shares = report.recall_by_region
        assert shares.keys() == {"north", "south"}
        assert report.recall == pytest.approx(sum(shares.values()) / 2)
        assert service.report(1) == report
        reserved = service.plan
        service.plan = dataclasses.replace(reserved, memory_gb=reserved.memory_gb / 2)
        assert service.report(1) is None  # it needs more memory than the shards have
        service.plan = reserved
        service.search(1, queries, K)
        taken = service.effort_taken(1)
        assert taken.queries == len(queries)
        assert taken.mean is not None
        assert taken.mean >= (report.effort or 0) > 0
