"""A collection of references in published tables, and a service of two shards for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
