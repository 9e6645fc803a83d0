from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from s4g_ray.config.schema import MiningConfig, RayConfig
from s4g_ray.distributed import autoscaling
from s4g_ray.distributed.placement import NODE_ID, Node
from s4g_ray.errors import RunError
from s4g_ray.index.plan import Resources, plan_for
from s4g_ray.index.sharded import planning
from s4g_ray.index.sharded.planning import ACCELERATOR, find_resources, plan_as
from s4g_ray.progress import Reporter


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


def test_shards_of_one_version_ask_for_no_room_to_swap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    room = Resources(memory_gb=(64.0,), cores=(8.0,))
    monkeypatch.setattr(planning, "ask_resources", lambda _: room)
    cfg = MiningConfig(max_search_hours=1e6, index_kind="flat")
    swapping, once = (
        planning.plan_shards(cfg, str(tmp_path), 10**6, 1024, 10**6, swaps=swaps)
        for swaps in (True, False)
    )
    assert swapping is not None
    assert once is not None
    assert once.shard_gb == swapping.shard_gb
    assert swapping.peak_gb - once.peak_gb == pytest.approx(once.shard_gb)
    assert swapping.gpu_gb - once.gpu_gb == pytest.approx(once.shard_gb)
    monkeypatch.setattr(planning, "read_newest_plan", lambda *_: once)
    # what was built alone may be served and replaced
    for num_vectors, dim in ((None, None), (10**6, 1024)):
        later = planning.plan_shards(cfg, str(tmp_path), num_vectors, dim, 10**6)
        assert later is not None
        assert later.peak_gb == swapping.peak_gb


class FakeRay:
    """A cluster whose index nodes come back when they have been asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[dict[str, float]]] = []
        self.withdrawn = 0
        self.comes_back = True
        monkeypatch.setattr("ray.nodes", list)
        monkeypatch.setattr(planning, "nodes_of", lambda _: self.nodes())
        monkeypatch.setattr(autoscaling, "nodes_of", lambda _: self.nodes())
        monkeypatch.setattr(autoscaling, "placement_group", self.ask)
        monkeypatch.setattr(autoscaling, "remove_placement_group", self.withdraw)
        monkeypatch.setattr(autoscaling, "CHECK_EVERY_S", 0.01)

    def nodes(self) -> list[Node]:
        head = Node(8, 0, {}, 64)
        index = Node(8, 0, {"pool": "index"}, 64)
        return [head, index, index] if self.asked and self.comes_back else [head]

    def ask(self, bundles: list[dict[str, float]], **_: Any) -> str:
        self.asked.append(bundles)
        return "group"

    def withdraw(self, _: str) -> None:
        self.withdrawn += 1


def test_nodes_of_an_index_that_are_gone_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeRay(monkeypatch)
    cfg = MiningConfig(label_selector={"pool": "index"}, index_kind="flat", num_shards=2)
    known = plan_for(cfg, 10**6, 4096)
    monkeypatch.setattr(planning, "read_newest_plan", lambda *_: known)
    planning.await_nodes(cfg, str(tmp_path), RayConfig(), Reporter())
    assert fake.asked == []  # no autoscaler is expected
    patient = RayConfig(nodes_timeout_s=60)
    ticks: list[int] = []
    planning.await_nodes(cfg, str(tmp_path), patient, Reporter(), tick=lambda: ticks.append(1))
    assert fake.asked == [[{"CPU": 0.0, "memory": known.peak_gb * 1e9}] * 2]
    assert (fake.withdrawn, ticks) == (1, [1])
    planning.await_nodes(cfg, str(tmp_path), patient, Reporter())
    assert len(fake.asked) == 1  # they are there
    monkeypatch.setattr(planning, "read_newest_plan", lambda *_: None)  # never built
    fake.comes_back = False
    late = RayConfig(nodes_timeout_s=0.05)
    planning.await_nodes(cfg, str(tmp_path), late, Reporter())  # plan_shards refuses
    assert fake.asked[1:] == [[{"CPU": 1e-4}] * 2]
    assert fake.withdrawn == 2


def test_what_was_freed_just_now_and_nodes_that_joined_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [Node(8, 0, {NODE_ID: "n1"}, 40), Node(8, 0, {NODE_ID: "n2"}, 40)]
    answers: list[dict[str, dict[str, float]]] = [
        {"n1": {"memory": 10e9}},  # a shard there has just been stopped; n2 has just joined
        {"n1": {"memory": 40e9}},
        {"n1": {"memory": 40e9}},
        {"n1": {"memory": 40e9, "CPU": 1.0}, "n2": {"memory": 40e9}},
        {"n1": {"memory": 40e9, "CPU": 7.0}, "n2": {"memory": 40e9}},
        {"n1": {}, "n2": {}},
    ]
    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr(planning, "nodes_of", lambda _: nodes)
    monkeypatch.setattr(planning, "available_resources_per_node", lambda: answers.pop(0))
    monkeypatch.setattr(planning, "AGAIN_S", 0.0)
    assert planning.ask_resources(MiningConfig()).memory_gb == (40, 40)
    assert len(answers) == 1
    monkeypatch.setattr(planning, "SETTLE_S", 0.0)
    assert planning.ask_resources(MiningConfig()).memory_gb == (0, 0)  # what there is by then


def test_a_first_plan_waits_for_memory_that_is_about_to_be_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rooms = [Resources(memory_gb=(gb,), cores=(8.0,)) for gb in (0.1, 0.1, 16.0)]
    rooms.insert(1, Resources(memory_gb=(), cores=()))  # its node is away for a moment
    monkeypatch.setattr(planning, "ask_resources", lambda _: rooms.pop(0))
    monkeypatch.setattr("time.sleep", lambda _: None)
    plan = planning.plan_shards(MiningConfig(), str(tmp_path), 10**6, 1024, 10**6)
    assert plan is not None
    assert rooms == []
