"""Actors start after workers, and make room when workers are placed again."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from s4g_ray.config.schema import EmbeddingConfig
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.distributed.placement_gate import Gate, PlacementGate
from s4g_ray.encoder.actors import EncoderPool, ReleasedError
from s4g_ray.errors import RunError
from tests.support.forked_processes import variables


def test_a_gate_admits_actors_while_workers_are_placed_and_kills_them_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[str] = []
    monkeypatch.setattr("s4g_ray.distributed.placement_gate.ray.kill", killed.append)

    async def scene() -> None:
        gate = Gate(releases=True)
        assert await gate.wait_until_open(0.01) is None
        await gate.close()
        waiting = asyncio.create_task(gate.wait_until_open(5))
        await asyncio.sleep(0)
        await gate.open()
        assert await waiting == 1
        assert await gate.admit(["a", "b"], 1)
        await gate.close()
        assert killed == ["a", "b"]
        assert not await gate.admit(["c"], 1)
        await gate.open()
        assert not await gate.admit(["c"], 1)  # created before the gate closed
        assert await gate.wait_until_open(0.01) == 2
        assert await gate.admit(["c"], 2)
        await gate.close()
        assert killed == ["a", "b", "c"]
        assert await gate.num_releases() == 3

    asyncio.run(scene())


def test_a_gate_without_releases_orders_the_first_placement_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[str] = []
    monkeypatch.setattr("s4g_ray.distributed.placement_gate.ray.kill", killed.append)

    async def scene() -> None:
        gate = Gate(releases=False)
        await gate.close()
        assert await gate.wait_until_open(0.01) is None
        await gate.open()
        assert await gate.admit(["a"], 0)
        await gate.close()
        assert await gate.wait_until_open(0.01) == 0

    asyncio.run(scene())
    assert killed == []


class FakeGate(PlacementGate):
    """A gate in this process: it closes once more before each of `closings` attempts ends."""

    def __init__(self, closings: int = 0) -> None:
        self.count = 1
        self.closings = closings

    def wait_until_open(self, check: Any) -> int:
        check()
        return self.count

    def admit(self, actors: Any, num_releases: int) -> bool:
        if self.closings:
            self.closings -= 1
            self.count += 1
        return num_releases == self.count

    def has_released(self, num_releases: int) -> bool:
        return num_releases != self.count


class FakeActor:
    """An actor that does nothing."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.release_memory = SimpleNamespace(remote=lambda: None)


class FakePool(EncoderPool):
    """A pool of one actor, with another number at each start."""

    def __init__(self, gate: FakeGate) -> None:
        super().__init__(ModelConfig(), EmbeddingConfig(gpus_per_actor=0.4), 1.0, gate)
        self.created = 0

    def _create_actors(self, count: int) -> tuple[Any, ...]:
        self.created += 1
        return (FakeActor(self.created),)


@contextmanager
def faked_starts() -> Iterator[list[str]]:
    """Record the waits for actors and the kills in place of Ray."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        where = "s4g_ray.encoder.actors."

        def record(name: str) -> Any:
            def call(actors: Any, *_: object) -> Any:
                calls.append(f"{name} {actors[0].number}")
                return actors

            return call

        patch.setattr(where + "kill", record("kill"))
        patch.setattr(where + "await_start", record("all"))
        patch.setattr(where + "await_some", record("some"))
        patch.setattr(where + "ray.get", lambda *_, **__: None)
        yield calls


def test_a_pool_starts_again_what_was_created_while_the_gate_closed() -> None:
    pool = FakePool(FakeGate(closings=1))
    with faked_starts() as calls:
        (actor,) = pool.start_actors()
        assert actor.number == 2
        assert calls == ["kill 1", "all 2"]


def lose_actors(pool: FakePool, gate: FakeGate) -> None:
    """Run a job that fails because the gate closes."""
    with pool.job() as actors:
        assert actors[0].number == 1
        gate.count += 1
        raise RunError("actor died")


def test_a_job_whose_actors_made_room_says_so_and_the_next_has_new_ones() -> None:
    gate = FakeGate()
    pool = FakePool(gate)
    with faked_starts() as calls:
        with pytest.raises(RunError, match=r"^part 3$"), pool.job():
            raise RunError("part 3")
        with pytest.raises(ReleasedError, match="made room: actor died"):
            lose_actors(pool, gate)
        with pool.job() as actors:
            assert actors[0].number == 2
        assert calls == ["all 1", "some 2"]  # a node may be gone: those that find room


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests.support.gpu_nodes_run prints: on a cluster of its own, with logical GPUs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.gpu_nodes_run", str(tmp_path_factory.mktemp("run"))],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, **variables()},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_shared(found: dict[str, Any], nodes: list[str]) -> None:
    """Check that each GPU of the nodes has one worker and one embedding actor."""
    gpus = sorted([node, gpu] for node in nodes for gpu in ("0", "1"))
    assert sorted(found["workers"]) == gpus
    assert sorted(found["actors"]) == gpus


@pytest.mark.cluster
def test_workers_and_actors_share_gpus_though_the_actors_were_wanted_first(
    scene: dict[str, Any],
) -> None:
    check_shared(scene["found"][0], scene["nodes"][:2])


@pytest.mark.cluster
def test_workers_and_actors_share_gpus_again_when_a_node_died_and_another_came(
    scene: dict[str, Any],
) -> None:
    first, _, third = scene["nodes"][:3]
    check_shared(scene["found"][1], [first, third])


@pytest.mark.cluster
def test_workers_on_a_drained_node_save_move_to_others_and_do_not_count_as_a_failure(
    scene: dict[str, Any],
) -> None:
    """The only failure that train.max_failures allows is the node that died."""
    first, _, _, fourth = scene["nodes"]
    moved = scene["found"][2]
    check_shared(moved, [first, fourth])
    assert scene["saved"] > 0
    assert moved["steps"] == [scene["saved"]] * 4
    assert len(moved["lost"]) == 2
    assert moved["lost"][1] == "its node is about to be taken away"
