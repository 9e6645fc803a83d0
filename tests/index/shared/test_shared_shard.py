"""A shared shard stops when its last user leaves or gives no sign."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from s4g_ray.errors import RunError
from s4g_ray.index.sharded.versions import ShardSetup
from s4g_ray.index.shared import shared_shard
from s4g_ray.index.shared.shared_shard import SharedShard

SOON_S = 60.0  # in which a thread looks at least once


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_shard, "LOOK_S", 0.01)


def start(
    folder: Path, user_s: float = 3600, start_s: float = 3600
) -> tuple[SharedShard, queue.Queue[str]]:
    """A shard without a version, and the queue that gets an entry when it stops."""
    stops: queue.Queue[str] = queue.Queue()
    setup = ShardSetup(str(folder), 0, 1, num_threads=1, use_gpu=False)
    return SharedShard(setup, lambda: stops.put("stopped"), user_s, start_s), stops


def test_the_last_user_that_leaves_stops_it_once(tmp_path: Path) -> None:
    shard, stops = start(tmp_path, start_s=0)
    shard.beat("a")
    shard.beat("b")
    assert shard.count_users() == 2
    shard.leave("a")
    shard.beat("b")
    assert stops.empty()
    shard.leave("b")
    shard.leave("b")
    assert stops.get(timeout=SOON_S) == "stopped"
    assert stops.empty()


def test_a_user_without_signs_is_gone(tmp_path: Path) -> None:
    shard, stops = start(tmp_path, user_s=0.05, start_s=0)
    shard.beat("a")
    assert stops.get(timeout=SOON_S) == "stopped"


def test_it_stops_where_nobody_comes(tmp_path: Path) -> None:
    _, stops = start(tmp_path, start_s=0.05)
    assert stops.get(timeout=SOON_S) == "stopped"


def test_a_user_learns_that_the_version_cannot_be_loaded(tmp_path: Path) -> None:
    shard, _ = start(tmp_path)
    with pytest.raises(RunError, match=r"version 3 of .* is not in service \(in service: none\)"):
        shard.join("a", 3)
