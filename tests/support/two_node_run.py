"""A run on two nodes, of which one dies and another comes: python -m tests.node_run CONFIG. Elastic ones shrink first.

`ray.cluster_utils.Cluster` makes nodes of processes of this machine; it wants the main thread, so the run has another.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import ray
from ray.cluster_utils import Cluster

from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.pipeline.driver import run
from tests.support.faulty_runs import records, steps


def until(what: Callable[[], bool], thread: threading.Thread, timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert thread.is_alive(), "the run has ended"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def main(config: RunConfig) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    other = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    thread = threading.Thread(target=run, args=(config,))
    thread.start()
    try:
        until(lambda: [r["workers"] for r in records(config, "workers")] == [2], thread)
        until(lambda: steps(config)[-1:] >= [3], thread)
        cluster.remove_node(other, allow_graceful=False)
        seen = [2]
        if config.train.workers[0] == 1:
            seen.append(1)
            until(lambda: [r["workers"] for r in records(config, "workers")] == seen, thread)
            reached = records(config, "workers")[-1]["after_step"]
            until(lambda: steps(config)[-1:] > [reached + 2], thread)
        cluster.add_node(num_cpus=2)
        seen.append(2)
        until(lambda: [r["workers"] for r in records(config, "workers")] == seen, thread)
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(load_config(sys.argv[1]))
