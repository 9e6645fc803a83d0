"""Attach to the shards of a published version, and start those that are not there.

The shards are detached actors under names that follow from the folder: all processes of a cluster
find the same ones. They stop when the last user has left, or gives no sign any more.
"""

from __future__ import annotations

import atexit
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from s4g_ray import __version__
from s4g_ray.arrays import Floats32
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.area import Area
from s4g_ray.distributed.actors import describe_late, kill
from s4g_ray.distributed.placement import nodes_of, shard_need
from s4g_ray.errors import RunError, UnavailableError, reason_of
from s4g_ray.index.plan import PROCESS_GB, IndexPlan
from s4g_ray.index.sharded.client import IndexClient
from s4g_ray.index.sharded.shard_group import shard_options, spread_shards
from s4g_ray.index.sharded.versions import ShardSetup, version_folder
from s4g_ray.index.shared.shared_shard import SharedShard
from s4g_ray.index.top_k import Found
from s4g_ray.index.vector_checks import check_finite, check_vectors
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Manifest, open_published

NAMESPACE = "s4g-shared-indexes"
BEAT_S = 10.0  # between two signs of a user
LEAVE_S = 10.0  # in which all shards learn that a user leaves
TORCH_GB = 0.35  # of a process that searches by torch, measured: 0.81 GB in all beside the vectors
PAUSE_S = 0.2  # while Ray takes the name from a shard that has ended


class SharedIndex:
    """An index over actors that all processes of a Ray cluster share. Any thread may search it.

    A shard that dies is started again, and the search that it interrupts is repeated, for up to
    start_timeout_s.
    """

    def __init__(self, folder: str, version: int, start_timeout_s: float) -> None:
        """Read the manifest of a version in a folder. Raises RunError for one that is damaged."""
        self._folder = folder
        self._version = version
        self._start_timeout_s = start_timeout_s
        manifest = open_published(version_folder(folder, version), "index")
        self._num_vectors = int(manifest.info["num_vectors"])
        self.plan = IndexPlan(**manifest.info["plan"])
        self.effort: int | None = manifest.info["effort"]
        self.memory_gb = find_memory_gb(manifest)
        self._names = name_shards(folder, version, len(manifest.parts))
        self._lock = threading.Lock()
        self._membership = Membership(uuid.uuid4().hex)
        self._client = self._attach()
        self._membership.start()
        # an index that nobody holds any more is left, too
        weakref.finalize(self, self._membership.ended.set).atexit = False

    @classmethod
    def open(cls, folder: str, version: int, *, start_timeout_s: float = 120.0) -> Self:
        """Attach to the shards of folder/v=000N, on the Ray cluster that is connected.

        Returns when all shards have loaded their files. Raises RunError for shards that find no
        room within start_timeout_s, and for files that cannot be loaded.
        """
        return cls(files.absolute(folder), version, start_timeout_s)

    def __len__(self) -> int:
        """Return the number of vectors."""
        return self._num_vectors

    @property
    def kind(self) -> str:
        """The plan's kind."""
        return self.plan.kind

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return len(self._names)

    @property
    def client(self) -> IndexClient:
        """The client of the shards that are known now."""
        return self._client

    def search(self, queries: Floats32, k: int, *, area: Area | None = None) -> Found:
        """Search as VectorIndex.search does: queries[M, D] -> ids[M, k], scores[M, k].

        Raises ValueError as it does, and UnavailableError when a shard stays away for longer than
        start_timeout_s.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"k={k} is not within 1..{len(self)}, the size of the index")
        check_vectors(queries, self.plan.dim)
        check_finite(queries, 0)
        if not len(queries):
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            client = self._client
            try:
                return client.search(self._version, queries, k, area=area)
            except RunError as error:
                if not isinstance(error.__cause__, RayActorError) or self._membership.is_over:
                    raise
                if time.monotonic() >= deadline:
                    raise UnavailableError(str(error)) from error
            self._attach_again(client)

    def close(self) -> None:
        """Leave the shards; the last user stops them. A closed index cannot be searched."""
        self._membership.end()

    def _attach_again(self, client: IndexClient) -> None:
        """Replace a client whose shards have ended, unless another thread has done it."""
        with self._lock:
            if self._client is client:
                self._client = self._attach()

    def _attach(self) -> IndexClient:
        """Find or start all shards, and join them. Raises RunError after start_timeout_s."""
        cfg = MiningConfig(num_shards=len(self._names))
        need = shard_need(cfg, len(self._names), self.memory_gb)
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            shards = self._start_shards(cfg)
            ready = [shard.__ray_ready__.remote() for shard in shards]
            left_s = max(deadline - time.monotonic(), 0.0)
            _, late = ray.wait(ready, num_returns=len(ready), timeout=left_s)
            if late:
                waiting = [s for s, call in zip(shards, ready, strict=True) if call in late]
                message = describe_late(len(late), need, self._start_timeout_s)
                kill(waiting)  # nobody may need them any more, and they cannot end by themselves
                raise UnavailableError(message)
            client = IndexClient(shards, need.of_each, self._start_timeout_s)
            try:
                ray.get(ready)
                self._join(client)
            except (RayActorError, RunError) as error:
                cause = error if isinstance(error, RayActorError) else error.__cause__
                if not isinstance(cause, RayActorError):
                    raise
                if time.monotonic() >= deadline:
                    reason = reason_of(cause)
                    raise UnavailableError(f"an index shard cannot start: {reason}") from error
                time.sleep(PAUSE_S)  # it was ended by its last user just now
                continue
            self._membership.shards = shards
            return client

    def _join(self, client: IndexClient) -> None:
        user = self._membership.user

        def again(number: int) -> Any:
            join = client.shards[number].join.options(concurrency_group="build")
            return join.remote(user, self._version)

        client.collect([again(number) for number in range(len(client.shards))], again=again)

    def _start_shards(self, cfg: MiningConfig) -> tuple[Any, ...]:
        """Return the actors of these names; start those that are not there."""
        options = shard_options(cfg, self.memory_gb)
        options["concurrency_groups"] = {**options["concurrency_groups"], "users": 1}
        actor = ray.remote(**options)(SharedShard)
        need = shard_need(cfg, len(self._names), self.memory_gb)
        nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        shards = []
        for number, strategy in enumerate(spread_shards(cfg, need, nodes)):
            setup = ShardSetup(
                self._folder, number, len(self._names), cfg.index_threads, use_gpu=False
            )
            named = actor.options(
                name=self._names[number],
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                scheduling_strategy=strategy,
            )
            shards.append(named.remote(setup, stop_this_actor))
        return tuple(shards)


class Membership:
    """The signs of a user to its shards, given by a thread until it ends."""

    def __init__(self, user: str) -> None:
        self.user = user
        self.shards: Sequence[Any] = ()
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard-signs", daemon=True)

    @property
    def is_over(self) -> bool:
        """Return whether the user has left."""
        return self.ended.is_set()

    def start(self) -> None:
        """Begin to give signs, until `end` or the end of the process."""
        atexit.register(self.end)  # runs before Ray's own, which closes the connection
        self._thread.start()

    def end(self) -> None:
        """Leave the shards, and wait until they know."""
        self.ended.set()
        self._thread.join(2 * LEAVE_S)

    def _run(self) -> None:
        while not self.ended.wait(BEAT_S):
            self._tell("beat", BEAT_S)
        self._tell("leave", LEAVE_S)
        atexit.unregister(self.end)

    def _tell(self, method: str, timeout_s: float) -> None:
        if not ray.is_initialized():
            return
        with suppress(RayError):  # one that has ended is found by the next search
            calls = [
                getattr(shard, method)
                .options(concurrency_group="users", max_task_retries=0)
                .remote(self.user)
                for shard in self.shards
            ]
            done, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
            for call in done:
                with suppress(RayError):  # Ray prints errors that nobody fetches
                    ray.get(call)


def stop_this_actor() -> None:
    """End the actor that this process is, without a restart."""
    kill([ray.get_runtime_context().current_actor])


def name_shards(folder: str, version: int, count: int) -> list[str]:
    """Return the actors' names. Other releases have others: an actor keeps its code."""
    key = files.fingerprint(version_folder(folder, version).encode())[:16]
    return [f"s4g-shard-{__version__}-{key}-{number}-of-{count}" for number in range(count)]


def find_memory_gb(manifest: Manifest) -> float:
    """Return the memory that a shard of a published version takes while it loads its file, in GB.

    Exact kinds use the bytes of the file in place; others build their lists beside it.
    """
    plan = IndexPlan(**manifest.info["plan"])
    copies = 1 if plan.is_exact else 2
    file_gb = max(part.num_bytes for part in manifest.parts) / 1e9
    has_torch = plan.is_exact and str(manifest.info["engine"]).startswith("torch")
    return copies * file_gb + PROCESS_GB + TORCH_GB * has_torch
