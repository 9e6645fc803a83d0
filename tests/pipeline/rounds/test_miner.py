"""Index shards beside workers: they start after them, and those on GPUs start again with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from s4g_ray.config.schema import MiningConfig, RayConfig
from s4g_ray.distributed.placement_gate import PlacementGate
from s4g_ray.errors import RunError
from s4g_ray.pipeline.rounds.miner import Miner
from s4g_ray.progress import Reporter

START = ["nodes of index", "start index"]  # nodes are asked for first


class FakeGate(PlacementGate):
    """A gate in this process that closes when the test says so."""

    def __init__(self) -> None:
        self.count = 1
        self.admitted: list[Any] = []
        self.closes_at_start = False

    def wait_until_open(self, check: Any) -> int:
        check()
        return self.count

    def admit(self, actors: Any, num_releases: int) -> bool:
        if self.closes_at_start:
            self.closes_at_start = False
            self.count += 1
        self.admitted.extend(actors)
        return num_releases == self.count


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, rooms: list[int]) -> list[str]:
    """The folders of the services that were started, and those that were stopped."""
    events: list[str] = []

    class FakeService:
        def __init__(self, _: MiningConfig, folder: str, **options: Any) -> None:
            self.name = folder
            self.client = SimpleNamespace(shards=(f"shard of {folder}",))
            self.alive = True
            events.append(f"start {folder}")
            rooms.append(options["num_indexes"])

        def is_alive(self) -> bool:
            return self.alive

        def stop(self) -> None:
            events.append(f"stop {self.name}")

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.stop()

    def await_nodes(_: MiningConfig, folder: str, ray: RayConfig, *__: Any, tick: Any) -> None:
        tick()
        assert ray.nodes_timeout_s == 30
        events.append(f"nodes of {folder}")

    monkeypatch.setattr("s4g_ray.pipeline.rounds.miner.IndexService", FakeService)
    monkeypatch.setattr("s4g_ray.pipeline.rounds.miner.await_nodes", await_nodes)
    return events


@pytest.fixture
def rooms() -> list[int]:
    """The number of indexes that each started service shares the free memory with."""
    return []


def make_miner(gate: FakeGate, gpus: float) -> Miner:
    split = SimpleNamespace(query_ids=[1, 2])
    graphs: Any = SimpleNamespace(
        folder=SimpleNamespace(path=str, info={}), split=split, collections=("pairs", "gallery")
    )
    mining = MiningConfig(gpus_per_shard=gpus)
    ray = RayConfig(start_timeout_s=1.0, nodes_timeout_s=30.0)
    return Miner(graphs, mining, Reporter(), seed=0, ray=ray, gate=gate)


def test_shards_on_gpus_are_admitted_and_start_again_after_they_made_room(
    started: list[str],
) -> None:
    gate = FakeGate()
    with make_miner(gate, 0.1) as miner:
        first = miner.service_for("pairs", 9, 4)
        assert miner.service_for("pairs", 9, 4) is first
        assert gate.admitted == ["shard of index"]
        gate.count += 1
        assert miner.service_for("pairs", 9, 4) is not first
        assert started == [*START, "stop index", *START]
    assert started[5:] == ["stop index"]


def test_shards_that_started_while_workers_were_placed_start_again_with_the_next_try(
    started: list[str],
) -> None:
    gate = FakeGate()
    gate.closes_at_start = True
    with make_miner(gate, 0.1) as miner:
        with pytest.raises(RunError, match="workers were placed anew"):
            miner.service_for("pairs", 9, 4)
        miner.service_for("pairs", 9, 4)
        assert started == [*START, "stop index", *START]


def test_shards_on_cpus_stay_when_workers_are_placed_again(started: list[str]) -> None:
    gate = FakeGate()
    with make_miner(gate, 0) as miner:
        first = miner.service_for("pairs", 9, 4)
        gate.count += 1
        assert miner.service_for("pairs", 9, 4) is first
        assert gate.admitted == []
    with pytest.raises(RunError, match="the run ends"):
        miner.service_for("gallery", 9, 4)
    assert started == [*START, "stop index"]


def test_a_service_that_lost_a_shard_is_replaced(started: list[str]) -> None:
    with make_miner(FakeGate(), 0) as miner:
        first: Any = miner.service_for("pairs", 9, 4)
        assert miner.service_for("pairs", 9, 4) is first
        vars(first)["alive"] = False
        assert miner.service_for("pairs", 9, 4) is not first
        assert started == [*START, "stop index", *START]


def test_the_first_index_leaves_room_for_the_one_that_starts_later(
    started: list[str], rooms: list[int]
) -> None:
    with make_miner(FakeGate(), 0) as miner:
        first: Any = miner.service_for("pairs", 9, 4)
        miner.service_for("gallery", 9, 4)
        vars(first)["alive"] = False
        miner.service_for("pairs", 9, 4)
    assert rooms == [2, 1, 1]
