"""Start the shards' actors and call a method on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s4g_ray.config.schema import MiningConfig
from s4g_ray.distributed.actors import await_start, kill
from s4g_ray.distributed.placement import NODE_ID, Need, Node, nodes_of, shard_need
from s4g_ray.index.sharded.client import IndexClient
from s4g_ray.index.sharded.shard import IndexShard
from s4g_ray.index.sharded.versions import ShardSetup

# searches that a shard answers at the same time: one is sent and merged while the other computes
SEARCHES = 2
# retries of a call whose shard died during it; a call that kills its shard each time fails then
RETRIES = 3


class ShardGroup:
    """The actors of an index. Calls made here run beside searches, one at a time on each shard."""

    def __init__(
        self,
        cfg: MiningConfig,
        folder: str,
        num_shards: int,
        memory_gb: float,
        start_timeout_s: float,
    ) -> None:
        """Start the shards. memory_gb: that Ray keeps for each; 0: none is kept."""
        actor = ray.remote(**shard_options(cfg, memory_gb))(IndexShard)
        need = shard_need(cfg, num_shards, memory_gb)
        nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        strategies = spread_shards(cfg, need, nodes)
        setups = [
            ShardSetup(folder, number, num_shards, cfg.index_threads, cfg.gpus_per_shard > 0)
            for number in range(num_shards)
        ]
        shards = [
            actor.options(scheduling_strategy=strategy).remote(setup)
            for strategy, setup in zip(strategies, setups, strict=True)
        ]
        demand = f"{need.of_each} and {need.selection}" if need.selector else need.of_each
        self.memory_gb = memory_gb
        self.client = IndexClient(tuple(shards), demand, start_timeout_s)
        await_start(self.client.shards, need, start_timeout_s)

    def __len__(self) -> int:
        return len(self.client.shards)

    def _start_calls(
        self, method: str, arguments: Sequence[Sequence[Any]], **options: Any
    ) -> list[Any]:
        methods = [getattr(shard, method) for shard in self.client.shards]
        return [
            call.options(concurrency_group="build", **options).remote(*own)
            for call, own in zip(methods, arguments, strict=True)
        ]

    def each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """Call a method on every shard with its own arguments and return the answers.

        Raises RunError for a shard that fails.
        """
        calls = self._start_calls(method, arguments)

        def again(number: int) -> Any:
            call = getattr(self.client.shards[number], method)
            return call.options(concurrency_group="build").remote(*arguments[number])

        return self.client.collect(calls, again=again)

    def each_with_refs(
        self, method: str, arguments: Sequence[Sequence[Any]]
    ) -> tuple[list[Any], list[Any]]:
        """Call as `each` does a method that returns two results: first results, references.

        The second results stay in the object store; only references to them are returned.
        """
        calls = self._start_calls(method, arguments, num_returns=2)
        first_results = [call[0] for call in calls]
        references = [call[1] for call in calls]
        return self.client.collect(first_results, references), references

    def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method on every shard with the same arguments and return the answers.

        Raises RunError for a shard that fails.
        """
        return self.each(method, [arguments] * len(self))

    def ask_first(self, method: str, *arguments: Any) -> Any:
        """Call a method on the first shard alone and return its answer.

        Raises RunError when it fails.
        """
        call = getattr(self.client.shards[0], method).options(concurrency_group="build")
        return self.client.collect([call.remote(*arguments)])[0]

    def stop(self) -> None:
        """Stop all shards."""
        kill(self.client.shards)


def spread_shards(cfg: MiningConfig, need: Need, nodes: Sequence[Node]) -> list[Any]:
    """Return the scheduling strategy of each shard: the nodes that suit take turns.

    Ray's own SPREAD is not enough: other actors and tasks take turns of it, so that two shards may
    start on one node of three. A shard starts on another node where its own has no room or is lost.
    (A busy node counts as one without room even for a shard that asks for nothing.)
    """
    suitable = []
    for node in nodes:
        has_room = node.cpus >= max(need.cpus, 1e-4) and node.gpus >= need.gpus
        has_memory = node.memory_gb is None or node.memory_gb >= need.memory_gb
        if has_room and has_memory and need.fits(node):
            suitable.append(node.labels[NODE_ID])
    if cfg.shard_placement == "DEFAULT" or not suitable:
        return [cfg.shard_placement] * need.count
    asks = need.cpus > 0 or need.gpus > 0 or need.memory_gb > 0
    return [
        NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=asks)
        for node in islice(cycle(suitable), need.count)
    ]


def shard_options(cfg: MiningConfig, memory_gb: float) -> dict[str, Any]:
    """Return Ray's options for a shard: resources, labels, restarts, concurrency."""
    return {
        "memory": round(memory_gb * 1e9) or None,
        "num_cpus": cfg.cpus_per_shard,
        "num_gpus": cfg.gpus_per_shard,
        "label_selector": cfg.label_selector,
        "max_restarts": -1,
        "max_task_retries": RETRIES,
        # a GPU index answers one search at a time
        "concurrency_groups": {"build": 1, "search": 1 if cfg.gpus_per_shard else SEARCHES},
    }
