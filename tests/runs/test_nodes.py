"""On several nodes: what runs where, and the same end when one of them dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.pipeline.driver import run
from tests.conftest import NUM_TRAIN, tiny_config
from tests.support.faulty_runs import Command, records, steps
from tests.support.three_node_run import SPREAD

pytestmark = pytest.mark.cluster
EPOCHS, BATCHES = 2, NUM_TRAIN // 16


def test_the_work_is_spread_over_nodes_and_a_run_that_loses_one_ends_with_the_weights_of_one_on_a_single_node(
    ray_cluster: None, synthetic: GeoDataset, tmp_path: Path
) -> None:
    """Three nodes of two CPUs; a worker takes one, so that two nodes have room for all that is left."""
    config = tiny_config(
        tmp_path / "run",
        synthetic.uri,
        train={"epochs": EPOCHS, "cpus_per_worker": 1.0},
        sampling={"max_pairs_per_cell": 40},
        embedding={"num_actors": 2, "part_rows": 48},
        mining={"num_shards": 2, "exact_engine": "torch", "part_queries": 48, "every_epochs": 1},
        checkpoint={"every_steps": 2},
        evaluation={"before_training": False, "every_epochs": EPOCHS},
    )
    whole = config.model_copy(update={"run_dir": str(tmp_path / "whole")})
    run(whole)
    command = Command(config, module="tests.spread_run")
    assert command.wait(300) == 0, command.output
    assert command.left_behind() == []

    nodes = json.loads(Path(config.run_dir, SPREAD).read_text())
    assert len(nodes["RayTrainWorker"]) == len(set(nodes["RayTrainWorker"])) == 2
    assert len(set(nodes["EncoderActor"])) == len(set(nodes["IndexShard"])) == 2
    for tasks in ("split_graph_part", "plan_cell", "Map(_embed_part)", "Map(_mine_group)"):
        assert len(set(nodes[tasks])) >= 2, (tasks, nodes)

    ends = [
        Path(c.run_dir, f"checkpoints/epoch={EPOCHS:04d}/model.safetensors").read_bytes()
        for c in (config, whole)
    ]
    assert ends[0] == ends[1]
    assert steps(config) == steps(whole) == list(range(1, EPOCHS * BATCHES + 1))
    assert records(config, "lost")
