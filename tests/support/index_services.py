"""A collection of references in published tables, and a service of two shards for it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from s4g_ray.config.schema import MiningConfig
from s4g_ray.index.sharded.service import IndexService
from tests.support.embedding_tables import Array

K = 12


def config(**keys: Any) -> MiningConfig:
    return MiningConfig(**{"num_shards": 2, "index_threads": 1, "exact_engine": "torch", **keys})


@dataclass(frozen=True)
class Collection:
    ids: Array
    vectors: Array
    tables: list[str]


@dataclass(frozen=True)
class Started:
    service: IndexService
    folder: Path


def kill_shard(shard: Any, *, no_restart: bool = False) -> None:
    """Kill a shard, and wait until its process is gone: ray.kill returns before."""
    number = ray.get(shard.__ray_call__.remote(lambda _: os.getpid()))
    ray.kill(shard, no_restart=no_restart)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{number}/exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
