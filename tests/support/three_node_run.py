"""A run on three nodes, of which two die: python -m tests.support.three_node_run CONFIG.

A node with a worker dies in the second epoch; the two others have room for all. Then the next dies,
and another comes. spread.json in the run's folder records where everything ran until the first
death, as ids of nodes for each name.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_tasks

from s4g_ray.config.loading import load_config
from s4g_ray.pipeline.run import run
from tests.conftest import NUM_TRAIN
from tests.support.faulty_runs import records, steps
from tests.support.two_node_run import until, workers

# what runs on more than one node: actors by their class, tasks by their name
ACTORS = ("RayTrainWorker", "EncoderActor", "IndexShard")
TASKS = ("split_graph_part", "plan_cell", "_run_task")
WORK = (*ACTORS, *TASKS)
SPREAD = "spread.json"
SECOND_DIED = "second_died"  # a file in the run's folder


def find_nodes(address: str) -> dict[str, list[str]]:
    """Return the nodes of all actors of each class, and of all tasks of each name that have run."""
    actors: list[Any] = list_actors(address, limit=1000)
    tasks: list[Any] = list_tasks(address, [("type", "=", "NORMAL_TASK")], limit=10_000)
    found = defaultdict(list)
    for actor in actors:
        if actor.node_id:
            found[actor.class_name].append(actor.node_id)
    for task in tasks:
        if task.node_id:
            found[task.name].append(task.node_id)
    return found


def find_spread(address: str) -> dict[str, list[str]]:
    """Return the nodes as soon as Ray knows of two for each name; after a minute as they are."""
    deadline = time.monotonic() + 60
    while True:
        found = find_nodes(address)
        if all(len(set(found[name])) > 1 for name in WORK) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def main() -> None:
    config = load_config(sys.argv[1])
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 5, "include_dashboard": True}
    )
    others = [cluster.add_node(num_cpus=5) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    thread = threading.Thread(target=run, args=(config,))
    thread.start()
    try:
        until(lambda: steps(config)[-1:] >= [NUM_TRAIN // config.train.batch_size + 2], thread)
        found = find_spread(cluster.address)
        first = next(node for node in others if node.node_id in found["RayTrainWorker"])
        cluster.remove_node(first, allow_graceful=False)
        Path(config.run_dir, SPREAD).write_text(json.dumps(found))
        until(lambda: workers(config) == [2, 2], thread)
        reached = records(config, "workers")[-1]["after_step"]
        until(lambda: steps(config)[-1:] > [reached + 2], thread)
        (second,) = (node for node in others if node is not first)
        cluster.remove_node(second, allow_graceful=False)
        Path(config.run_dir, SECOND_DIED).touch()
        cluster.add_node(num_cpus=5)
        until(lambda: workers(config) == [2, 2, 2], thread)
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
