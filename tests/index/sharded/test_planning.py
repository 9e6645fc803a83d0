from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from s4g_ray.config.schema import MiningConfig
from s4g_ray.distributed.placement import NODE_ID, Node
from s4g_ray.errors import RunError
from s4g_ray.index.plan import Resources, plan_for
from s4g_ray.index.sharded import planning
from s4g_ray.index.sharded.planning import ACCELERATOR, find_resources, plan_as


def test_room_is_what_is_free_on_the_nodes_that_the_selector_allows() -> None:
    nodes = [
        Node(0, 0, {"zone": "a", NODE_ID: "head"}, 4),  # a head that runs nothing
        Node(8, 0, {"zone": "a", NODE_ID: "n1"}, 40),
        Node(16, 0, {"zone": "b", NODE_ID: "n2"}, 36),
        Node(16, 0, {"zone": "b", NODE_ID: "gone"}, 36),
    ]
    free = {
        "head": {"memory": 4e9},
        "n1": {"memory": 20e9, "CPU": 3.0},
        "n2": {"memory": 1e9},
    }
    anywhere = find_resources(MiningConfig(), nodes, free)
    assert anywhere == Resources(memory_gb=(20, 1, 0), cores=(8, 16, 16), free_cpus=(3, 0, 0))
    north = find_resources(MiningConfig(label_selector={"zone": "a"}), nodes, free)
    assert north == Resources(memory_gb=(20,), cores=(8,), free_cpus=(3,))
    empty = find_resources(MiningConfig(), nodes)
    assert empty == Resources((40, 36, 36), (8, 16, 16), free_cpus=(8, 16, 16))
    assert find_resources(MiningConfig(label_selector={"zone": "z"}), nodes, free).memory_gb == ()


def test_shards_on_gpus_count_the_nodes_with_gpus_and_their_memory_where_it_is_known() -> None:
    cfg = MiningConfig(gpus_per_shard=0.5)
    large = Node(8, 4, {ACCELERATOR: "H100", NODE_ID: "n1"}, 100)
    small = Node(8, 2, {ACCELERATOR: "L4", NODE_ID: "n2"}, 100)
    nodes = [Node(8, 0, {}, 100), large, small]
    free = {"n1": {"memory": 90e9, "GPU": 3.0}, "n2": {"memory": 80e9, "CPU": 2.0}}
    found = find_resources(cfg, nodes, free)
    assert found == Resources((90, 80), (8, 8), (3, 0), 24, (0, 2))
    unknown = Node(8, 2, {ACCELERATOR: "new"}, 100)
    assert find_resources(cfg, [large, unknown]).gpu_memory_gb is None


def test_an_index_is_built_with_the_bits_that_its_memory_was_reserved_for() -> None:
    cfg = MiningConfig(max_search_hours=1e6)
    room = Resources(memory_gb=(30.0,), cores=(16.0,))
    planned = plan_for(cfg, 20_000_000, 1024, room)
    assert (planned.kind, planned.bits) == ("ivf_rabitq", 1)
    built = plan_as(planned, cfg, 20_000_000, 1024)
    assert dataclasses.replace(built, reason="") == dataclasses.replace(planned, reason="")
    assert built.peak_gb * built.num_shards <= 30
    fewer = plan_as(planned, cfg, 1_000_000, 1024, room)  # 4 bits fit here, and are not taken
    assert (fewer.kind, fewer.bits, fewer.num_shards) == ("ivf_rabitq", 1, planned.num_shards)


def test_kind_and_shards_stay_those_of_the_newest_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rooms = [Resources(memory_gb=(64.0,), cores=(8.0,))]
    monkeypatch.setattr(planning, "ask_resources", lambda _: rooms[-1])
    monkeypatch.setattr(planning, "SETTLE_S", 0.0)
    folder = str(tmp_path)
    known: dict[str, Any] = {}
    monkeypatch.setattr(planning, "read_newest_plan", lambda *_: known.get("plan"))
    cfg = MiningConfig(max_search_hours=10)
    assert planning.plan_shards(cfg, folder, None, None, None) is None
    first = planning.plan_shards(cfg, folder, 10**6, 64, 10**6)
    assert first is not None
    known["plan"] = first
    rooms.append(Resources(memory_gb=(2.0,), cores=(64.0,)))  # another cluster
    later = planning.plan_shards(cfg, folder, 10**6 + 5, 64, 10**6)
    assert later is not None
    assert (later.kind, later.num_shards) == (first.kind, first.num_shards)
    assert later.reason.endswith("kind and shards as before")
    assert planning.plan_shards(cfg, folder, None, None, None) is first
    rooms.append(Resources(memory_gb=(0.9,), cores=(8.0,)))  # less than before, or flat, takes
    smaller = planning.plan_shards(cfg, folder, 10**6, 64, 10**6)
    assert smaller is not None
    assert smaller.kind != first.kind
    rooms.append(Resources(memory_gb=(0.1,), cores=(8.0,)))
    with pytest.raises(RunError, match=r"1,000,000 vectors of D=64 as ivf_rabitq in \d+ shards? n"):
        planning.plan_shards(cfg, folder, 10**6, 64, 10**6)
    rooms.append(Resources(memory_gb=(), cores=()))
    with pytest.raises(RunError, match=r"no node can hold an index shard of 0 CPUs mining\.label_"):
        planning.plan_shards(
            MiningConfig(label_selector={"zone": "mars"}), folder, 10**6, 64, 10**6
        )


def test_an_index_leaves_room_for_those_that_start_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    room = Resources(memory_gb=(16.0,), cores=(8.0,))
    monkeypatch.setattr(planning, "ask_resources", lambda _: room)
    cfg = MiningConfig(max_search_hours=1e6)
    alone, first = (
        planning.plan_shards(cfg, str(tmp_path), 10**6, 1024, 10**6, count) for count in (1, 2)
    )
    assert alone is not None
    assert first is not None
    assert alone.peak_gb * alone.num_shards > 8
    assert first.peak_gb * first.num_shards <= 8
