"""Serve a stand-in gallery as `s4g serve` does: python -m tests.support.stand_in_service FOLDER.

Its batches take half a second.
"""

from __future__ import annotations

import functools
import sys

from s4g_ray.config.schema import RayConfig
from s4g_ray.serving.config import ServeConfig
from s4g_ray.serving.server import run_service
from tests.support.stand_in_gallery import open_stand_in


def say(address: str) -> None:
    print(address, flush=True)


if __name__ == "__main__":
    config = ServeConfig(gallery=sys.argv[1], port=0, cpus_per_replica=0.5)
    opener = functools.partial(open_stand_in, seconds=0.5)
    run_service(config, cluster=RayConfig(num_cpus=1), opener=opener, on_start=say)
    print("stopped", flush=True)
