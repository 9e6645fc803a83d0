from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s4g_ray.config.schema import MiningConfig
from s4g_ray.distributed.placement import NODE_ID, Node, shard_need
from s4g_ray.errors import RunError
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.index.sharded.shard_group import shard_options, spread_shards


def node(name: str, cpus: float = 4, gpus: float = 0, **labels: str) -> Node:
    # Ray accepts 56 hexadecimal digits
    return Node(cpus, gpus, {NODE_ID: name * 56, **labels}, 1 if name == "b" else 2)


def test_a_shard_asks_for_what_is_configured() -> None:
    options = shard_options(MiningConfig(), 0)
    assert (options["num_cpus"], options["num_gpus"]) == (0, 0)
    assert options["concurrency_groups"] == {"build": 1, "search": 2}
    asking = shard_options(MiningConfig(cpus_per_shard=0.5, gpus_per_shard=1), 2.5)
    assert (options["memory"], asking["memory"]) == (None, 2_500_000_000)
    assert (asking["num_cpus"], asking["num_gpus"]) == (0.5, 1)
    assert asking["concurrency_groups"] == {"build": 1, "search": 1}


@pytest.mark.parametrize(
    ("mining", "memory_gb", "wanted"),
    [
        ({}, 0, ["a", "b", "c", "a"]),
        ({"gpus_per_shard": 0.5}, 0, ["c", "c", "c", "c"]),
        ({"cpus_per_shard": 3}, 0, ["b", "c", "b", "c"]),
        ({"label_selector": {"zone": "north"}}, 0, ["a", "b", "a", "b"]),
        ({}, 2, ["a", "c", "a", "c"]),
    ],
)
def test_the_nodes_that_suit_take_turns_with_shards(
    mining: dict[str, Any], memory_gb: float, wanted: list[str]
) -> None:
    head = node("d", cpus=0, zone="north")
    nodes = [head, node("a", 2, zone="north"), node("b", zone="north"), node("c", gpus=1)]
    cfg = MiningConfig(**mining)
    strategies = spread_shards(cfg, shard_need(cfg, 4, memory_gb), nodes)
    assert [strategy.node_id[0] for strategy in strategies] == wanted
    assert all(strategy.soft for strategy in strategies)


def test_shards_are_left_to_ray_where_configured_or_where_no_node_suits() -> None:
    packed = MiningConfig(num_shards=2, shard_placement="DEFAULT")
    assert spread_shards(packed, shard_need(packed, 2), [node("a")]) == ["DEFAULT", "DEFAULT"]
    cfg = MiningConfig(num_shards=2, gpus_per_shard=1)
    assert spread_shards(cfg, shard_need(cfg, 2), [node("a")]) == ["SPREAD", "SPREAD"]


@pytest.mark.cluster
def test_shards_that_find_no_room_are_reported_and_stopped(
    ray_cluster: None, tmp_path: Path
) -> None:
    message = (
        r"^2 of 2 index shards did not start within 3 s: each asks for 0\.5 CPUs and a node of"
        r" mining\.label_selector=\{'zone': 'mars'\}; the cluster has"
        r" [\d.]+ CPUs and 0 GPUs free; the labels of"
    )
    no_such_node = MiningConfig(num_shards=2, label_selector={"zone": "mars"}, cpus_per_shard=0.5)
    with pytest.raises(RunError, match=message):
        IndexService(no_such_node, str(tmp_path / "index"), start_timeout_s=3)
    with IndexService(
        MiningConfig(num_shards=2, label_selector={"zone": "!mars"}),
        str(tmp_path / "index"),
        start_timeout_s=60,
    ) as service:
        assert service.report(1) is None
