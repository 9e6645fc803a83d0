"""Keep a Ray session open for the galleries of this process whose index is held by shards."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextlib import ExitStack

from s4g_ray.amounts import count_noun, format_bytes
from s4g_ray.config.schema import RayConfig
from s4g_ray.distributed.session import ray_session
from s4g_ray.distributed.start_checks import find_address, is_connected
from s4g_ray.errors import InputError
from s4g_ray.gallery.store.index_facts import IndexFacts
from s4g_ray.storage.s3_settings import StorageConfig


class _Session:
    """The session that galleries have opened, and how many use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._count = 0

    def enter(self, cluster: RayConfig, storage: StorageConfig) -> None:
        with self._lock:
            if not self._count:
                self._stack.enter_context(ray_session(cluster, storage))
                # of a process that closes no gallery; after the galleries have left their shards
                atexit.register(self._stack.close)
            self._count += 1

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._stack.close()
                atexit.unregister(self._stack.close)


_session = _Session()


def connect(
    uri: str, facts: IndexFacts, address: str | None, storage: StorageConfig
) -> Callable[[], None]:
    """Connect to the Ray cluster for a gallery's shards; return what ends its use of the session.

    A session of the caller stays his. Raises InputError where no cluster is named, or none answers.
    """
    cluster = RayConfig(address=address)
    if not is_connected() and not find_address(cluster):
        raise InputError(
            f"the index of {uri} is held by {count_noun(facts.num_shards, 'shard')} of"
            f" {format_bytes(1e9 * facts.shard_gb)} on a Ray cluster, and none is named: set"
            " RAY_ADDRESS to that of a cluster (`ray start --head` starts one here, for"
            " RAY_ADDRESS=auto), or build the gallery again with mining.num_shards=1, for a machine"
            " that holds it whole"
        )
    _session.enter(cluster, storage)
    return _session.leave
