"""An elastic run on two nodes, where one dies and another comes.

    python -m tests.support.two_node_run CONFIG

`ray.cluster_utils.Cluster` makes nodes of processes of this machine. It needs the main thread, so
the run has another.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.pipeline.run import run
from tests.support.faulty_runs import LOOK_EVERY_S, records, steps

# files in the run's folder: a node has died; the node that comes has a worker
DIED, RELEASED = "died", "released"


def workers(config: RunConfig) -> list[int]:
    """How many have started, each time."""
    return [record["workers"] for record in records(config, "workers")]


def until(what: Callable[[], bool], thread: threading.Thread, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert thread.is_alive(), "the run has ended"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(LOOK_EVERY_S)


def main() -> None:
    config = load_config(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    other = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    thread = threading.Thread(target=run, args=(config,))
    thread.start()
    try:
        until(lambda: workers(config) == [2], thread)
        until(lambda: steps(config)[-1:] >= [3], thread)
        cluster.remove_node(other, allow_graceful=False)
        Path(config.run_dir, DIED).touch()
        until(lambda: workers(config) == [2, 1], thread)
        reached = records(config, "workers")[-1]["after_step"]
        until(lambda: steps(config)[-1:] > [reached + 2], thread)
        cluster.add_node(num_cpus=2)
        until(lambda: workers(config) == [2, 1, 2], thread)
        Path(config.run_dir, RELEASED).touch()
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
