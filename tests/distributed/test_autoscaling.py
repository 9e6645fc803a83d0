from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from s4g_ray.config.schema import RayConfig
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.placement import Need, Node, NoRoomError, check_room
from s4g_ray.progress import Reporter
from tests.support.forked_processes import variables


def test_without_time_to_wait_needs_that_do_not_fit_are_refused_without_a_cluster() -> None:
    needs = [Need(2, "worker", 1.5)]
    with pytest.raises(NoRoomError, match="3 CPUs are needed") as caught:
        await_room(
            RayConfig(), lambda nodes: check_room(needs, [[]], nodes), [Node(2.0)], Reporter()
        )
    assert caught.value.needs == tuple(needs)


@pytest.mark.cluster
def test_missing_nodes_are_requested_awaited_and_no_longer_requested_once_they_are_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.growing_cluster"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, **variables()},
    )
    assert done.returncode == 0, done.stderr
    waited, found = done.stdout.splitlines()[-2:]
    assert waited == (
        "waiting up to 300 s for nodes: 3 CPUs are needed (2 workers x 1.5), but the cluster has 0;"
        " lower num_workers, num_actors, num_shards, num_searchers or what each takes, or raise"
        " ray.num_cpus"
    )
    assert json.loads(found) == {"asked": [[{"CPU": 1.5}, {"CPU": 1.5}]], "left": []}
