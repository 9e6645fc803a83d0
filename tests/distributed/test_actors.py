"""Actors that find no room are told from those that start slowly."""

from __future__ import annotations

from types import SimpleNamespace as Space

import pytest
import ray

from s4g_ray.distributed import actors
from s4g_ray.distributed.actors import count_waiting, describe_late
from s4g_ray.distributed.placement import Need

ACTORS = Need(4, "embedding actor", 0.25)
SHARDS = Need(2, "index shard", 0.5, 1, memory_gb=3.2)
Bundles = list[tuple[dict[str, float], int]]


@pytest.fixture
def demand(monkeypatch: pytest.MonkeyPatch) -> Bundles:
    """Return what Ray says to wait for room, which a test may add to."""
    found: Bundles = []

    def status(_: str) -> Space:
        bundles = [Space(bundle=bundle, count=count) for bundle, count in found]
        kinds = [Space(bundles_by_count=bundles)]
        return Space(resource_demands=Space(ray_task_actor_demand=kinds))

    monkeypatch.setattr(actors, "get_cluster_status", status)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: Space(gcs_address="head:1"))
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.1})
    return found


def test_actors_that_have_room_are_still_starting(demand: Bundles) -> None:
    said = (
        "2 of 4 embedding actors did not start within 120 s: they have found room, and their"
        " processes are still starting, as on a busy machine; raise ray.start_timeout_s, or end"
        " other work there"
    )
    assert describe_late(2, ACTORS, 120) == said
    demand.append(({"CPU": 8.0}, 5))  # of another job
    assert describe_late(2, ACTORS, 120) == said


def test_actors_without_room_are_counted_with_what_they_ask_for_and_what_is_free(
    demand: Bundles,
) -> None:
    demand.append(({"CPU": 0.25}, 1))
    assert describe_late(2, ACTORS, 120) == (
        "1 of 4 embedding actors did not start within 120 s: each asks for 0.25 CPUs; the cluster"
        " has 0.1 CPUs and 0 GPUs free; ask for less, free resources, or raise ray.start_timeout_s"
    )
    demand[0] = ({"CPU": 0.25}, 9)  # others ask for the same
    assert describe_late(2, ACTORS, 120).startswith("2 of 4 embedding actors did not start")


def test_a_demand_is_recognised_by_all_its_resources(demand: Bundles) -> None:
    demand.append(({"CPU": 0.5, "GPU": 1.0}, 1))
    assert count_waiting(SHARDS) == 0
    demand.append(({"CPU": 0.5, "GPU": 1.0, "memory": 3.2e9 - 7}, 2))
    assert count_waiting(SHARDS) == 2
