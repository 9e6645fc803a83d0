from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from s4g_ray.errors import RunError
from s4g_ray.index.sharded.client import IndexClient, LostShardError
from s4g_ray.index.sharded.merging import ShardAnswer
from tests.support.embedding_tables import Array, random_unit

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def queries() -> Array:
    return random_unit(np.random.default_rng(6), 30)


def answer(one: int, queries: Array) -> ShardAnswer:
    """One id for each query."""
    count = len(queries)
    return ShardAnswer(np.full((count, 1), one), np.ones((count, 1), np.float32), 0, 0)


class OneShard:
    """Answers with one id, after wait_s seconds."""

    def __init__(self, number: int, wait_s: float) -> None:
        self.number = number
        self.wait_s = wait_s

    def search(self, version: int, queries: Array, k: int, *_: object) -> Any:
        time.sleep(self.wait_s)
        return answer(self.number, queries)


def test_a_shard_that_does_not_answer_in_time_is_missing_and_named(
    ray_cluster: None, queries: Array
) -> None:
    options: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {"search": 1}}
    actor: Any = ray.remote(**options)(OneShard)
    fast = actor.remote(0, 0)
    slow = actor.remote(1, 600)
    IndexClient((fast,)).search(1, queries, 1)  # waits until the actor has started
    found = IndexClient((fast, slow, fast)).search_partial(1, queries, 3, timeout_s=5)
    assert found.missing_shards == (1,)
    with pytest.raises(RunError, match=r"no shard answered within 0\.5 s"):
        IndexClient((slow,)).search_partial(1, queries, 3, timeout_s=0.5)
    for shard in (fast, slow):
        ray.kill(shard)


class CountingShard:
    """Answers with the number of its calls; the second waits for a file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.calls = 0

    def search(self, version: int, queries: Array, k: int, *_: object) -> Any:
        self.calls += 1
        while self.calls == 2 and not Path(self.file).exists():
            time.sleep(0.01)
        return answer(self.calls, queries)


def test_late_calls_that_have_not_begun_are_cancelled(
    ray_cluster: None, queries: Array, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "num_cpus": 0,
        "concurrency_groups": {"search": 1},
        "max_task_retries": 3,
    }
    actor: Any = ray.remote(**options)(CountingShard)
    shard = actor.remote(str(tmp_path / "go"))
    client = IndexClient((shard,))
    assert client.search(1, queries, 1)[0][0] == 1
    for _ in range(6):  # the first of them keeps running
        with pytest.raises(RunError, match="no shard answered"):
            client.search_partial(1, queries, 1, timeout_s=0.1)
    time.sleep(1)  # the last cancellation is on its way
    (tmp_path / "go").touch()
    assert client.search(1, queries, 1)[0][0] == 3
    ray.kill(shard)


class Hog:
    """Takes resources, and says that it has them."""

    def is_there(self) -> bool:
        return True


def test_a_shard_that_cannot_return_is_an_error_in_time_and_a_slow_one_is_waited_for(
    ray_cluster: None, queries: Array
) -> None:
    """A resource that only one actor can have stands for the room of a node that is gone."""
    free = ray.available_resources()["CPU"]  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {
        "max_restarts": -1,
        "max_task_retries": 3,
        "concurrency_groups": {"search": 1},
    }
    actor: Any = ray.remote(**options)(OneShard)
    lost = actor.options(num_cpus=free).remote(0, 0)
    slow = actor.options(num_cpus=0).remote(1, 3)
    client = IndexClient((lost, slow), "4 CPUs", start_timeout_s=2)
    ray.get([one.__ray_ready__.remote() for one in client.shards], timeout=60)
    assert client.search(1, queries, 2)[0][0].tolist() == [0, 1]  # 3 s, but it answers meanwhile
    hog: Any = ray.remote(num_cpus=free)(Hog).remote()
    time.sleep(1)  # the hog waits for the room by then
    ray.kill(lost, no_restart=False)
    assert ray.get(hog.is_there.remote(), timeout=60)
    started = time.monotonic()
    with pytest.raises(
        LostShardError,
        match=r"index shard 0 is lost: it did not start again within 2 s\. .* room for 4 CPUs; add",
    ):
        client.search(1, queries, 2)
    assert time.monotonic() - started < 60
    for one in (hog, lost, slow):
        ray.kill(one)
