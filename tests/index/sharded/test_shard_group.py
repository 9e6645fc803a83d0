from __future__ import annotations

from pathlib import Path

import pytest

from s4g_ray.config.schema import MiningConfig
from s4g_ray.errors import RunError
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.index.sharded.shard_group import shard_options


def test_shards_are_spread_over_nodes_unless_configured_otherwise() -> None:
    options = shard_options(MiningConfig())
    assert (options["scheduling_strategy"], options["num_gpus"]) == ("SPREAD", 0)
    assert options["concurrency_groups"] == {"build": 1, "search": 2}
    packed = shard_options(
        MiningConfig(shard_placement="DEFAULT", cpus_per_shard=0.5, gpus_per_shard=1)
    )
    assert [packed[key] for key in ("scheduling_strategy", "num_cpus", "num_gpus")] == [
        "DEFAULT",
        0.5,
        1,
    ]
    assert packed["concurrency_groups"] == {"build": 1, "search": 1}


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
