"""A cluster without CPUs that gets a node when something waits for one, as from an autoscaler.

`python -m` this module: it prints as JSON what waited, and what still waits once the node is there.
"""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from s4g_ray.config.schema import RayConfig
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.placement import Need, check_room, nodes_of
from s4g_ray.progress import Reporter


def waiting() -> list[list[dict[str, float]]]:
    """The bundles of each placement group that waits for nodes."""
    table: dict[str, Any] = placement_group_table()
    return [
        list(group["bundles"].values()) for group in table.values() if group["state"] == "PENDING"
    ]


def main() -> None:
    """Stand in for an autoscaler. A Cluster adds nodes from the main thread alone."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=cluster.address, log_to_driver=False)
    needs = [
        Need(2, "worker", 1.5, selector={"pool": "gpu"}, section="train"),
        Need(3, "index shard", 0),
    ]
    fits = partial(check_room, needs, [[]])
    nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
    thread = threading.Thread(
        target=await_room, args=(RayConfig(nodes_timeout_s=300), fits, nodes, Reporter())
    )
    thread.start()
    while not (asked := waiting()) and thread.is_alive():
        time.sleep(0.1)
    cluster.add_node(num_cpus=3, labels={"pool": "gpu"})
    thread.join()
    fits(nodes_of(ray.nodes()))  # type: ignore[no-untyped-call]
    print(json.dumps({"asked": asked, "left": waiting()}))
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
