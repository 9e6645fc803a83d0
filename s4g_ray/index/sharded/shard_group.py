"""The actors, asked together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from s4g_ray.config.schema import MiningConfig
from s4g_ray.distributed.actors import await_start
from s4g_ray.distributed.placement import shard_need
from s4g_ray.index.sharded.client import IndexClient, answers_of
from s4g_ray.index.sharded.shard import IndexShard, ShardSetup

SEARCHES = (
    2  # that a shard answers at the same time: one is sent and merged while the other computes
)
RETRIES = 3  # of a call whose shard died under it; a call that kills its shard each time fails then


class ShardGroup:
    """The actors; what is asked here runs beside their searches, one call of a shard after the other."""

    def __init__(self, cfg: MiningConfig, folder: str, start_timeout_s: float) -> None:
        actor, use_gpu = ray.remote(**shard_options(cfg))(IndexShard), cfg.gpus_per_shard > 0
        setups = [
            ShardSetup(folder, n, cfg.num_shards, cfg.index_threads, use_gpu)
            for n in range(cfg.num_shards)
        ]
        self.client = IndexClient(tuple(actor.remote(setup) for setup in setups))
        await_start(self.client.shards, shard_need(cfg, cfg.num_shards), start_timeout_s)

    def __len__(self) -> int:
        return len(self.client.shards)

    def _ask(self, method: str, each: Sequence[Sequence[Any]], **options: Any) -> list[Any]:
        called = [getattr(shard, method) for shard in self.client.shards]
        return [
            method.options(concurrency_group="build", **options).remote(*arguments)
            for method, arguments in zip(called, each, strict=True)
        ]

    def all(self, method: str, each: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers of every shard to its own arguments. Raises RunError for a shard that fails."""
        return answers_of(self._ask(method, each))

    def both(self, method: str, each: Sequence[Sequence[Any]]) -> tuple[list[Any], list[Any]]:
        """As all, of a method that gives two things: the first, and references to the second, which stay away."""
        calls = self._ask(method, each, num_returns=2)
        kept = [call[1] for call in calls]
        return answers_of([call[0] for call in calls], kept), kept

    def same(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of every shard to the same arguments. Raises RunError for a shard that fails."""
        return self.all(method, [arguments] * len(self))

    def first(self, method: str, *arguments: Any) -> Any:
        """The answer of the first shard alone. Raises RunError when it fails."""
        call = getattr(self.client.shards[0], method).options(concurrency_group="build")
        return answers_of([call.remote(*arguments)])[0]


def shard_options(cfg: MiningConfig) -> dict[str, Any]:
    """What Ray is told of a shard."""
    return {
        "num_cpus": cfg.cpus_per_shard,
        "num_gpus": cfg.gpus_per_shard,
        "scheduling_strategy": cfg.shard_placement,
        "label_selector": cfg.label_selector,
        "max_restarts": -1,
        "max_task_retries": RETRIES,
        # a GPU index answers one search at a time
        "concurrency_groups": {"build": 1, "search": 1 if cfg.gpus_per_shard else SEARCHES},
    }
