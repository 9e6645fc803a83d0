"""On several nodes: what runs where, and the same end when some of them die."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s4g_ray.config.loading import override_config
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.pipeline.run import run
from tests.conftest import tiny_config
from tests.support.faulty_runs import Command, assert_same_end, held, records
from tests.support.three_node_run import SECOND_DIED, SPREAD, TASKS

pytestmark = pytest.mark.cluster
EPOCHS = 4


# Takes more than a minute: the workers start three times on a cluster of its own, and two deaths of
# nodes must be noticed.
def test_work_is_spread_over_nodes_and_a_run_that_loses_two_ends_with_the_weights_of_one_node(
    warm_pool: None, synthetic: GeoDataset, tmp_path: Path
) -> None:
    """Three nodes of five CPUs, each with room for one worker.

    After one has died the run continues on the others; after another, on one that comes. Embedding
    actors and index shards may be on the nodes that die, too.
    """
    config = tiny_config(
        tmp_path / "run",
        synthetic.uri,
        train={"epochs": EPOCHS, "cpus_per_worker": 3.0, "max_failures": 5},
        sampling={"max_pairs_per_cell": 40},
        embedding={"num_actors": 2, "part_mb": 0.005},
        mining={"num_shards": 2, "exact_engine": "torch", "part_mb": 0.002, "every_epochs": 1},
        checkpoint={"every_steps": 2},
        evaluation={"before_training": False, "every_epochs": EPOCHS},
    )
    whole = override_config(config, [f"run_dir={tmp_path / 'whole'}", "train.cpus_per_worker=0.5"])
    run(whole)
    # the run waits for both deaths
    faults = [
        held("plans/epoch=0003", Path(config.run_dir, SPREAD)),
        held("plans/epoch=0004", Path(config.run_dir, SECOND_DIED)),
    ]
    command = Command(config, faults, module="tests.support.three_node_run")
    assert command.wait() == 0, command.output
    assert command.left_behind() == []

    nodes = json.loads(Path(config.run_dir, SPREAD).read_text())
    assert len(nodes["RayTrainWorker"]) == len(set(nodes["RayTrainWorker"])) == 2
    assert len(set(nodes["EncoderActor"])) == len(set(nodes["IndexShard"])) == 2
    for tasks in TASKS:
        assert len(set(nodes[tasks])) >= 2, (tasks, nodes)

    assert_same_end(config, whole)
    assert len(records(config, "lost")) == 2
