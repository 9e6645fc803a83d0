"""Asks the shards of an index, from any process of the cluster, and says what went wrong with one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.errors import RunError
from s4g_ray.index.sharded.sharding import Found, merge_found


@dataclass(frozen=True)
class PartialResult:
    """What the shards that answered found: ids[M, n], scores[M, n], n = k unless they hold fewer vectors."""

    ids: Ints
    scores: Floats32
    missing_shards: tuple[int, ...]


@dataclass(frozen=True)
class IndexClient:
    """Asks the shards. Small and picklable: for Ray tasks and Ray Data."""

    shards: tuple[Any, ...]

    def search(self, version: int, queries: Floats32, k: int) -> Found:
        """queries[M, D] -> ids[M, k], scores[M, k] (cosine), best first, ties by lower id, from one version.

        Raises RunError for a version that is not in service, for queries or k that do not fit it, and for a shard
        that is dead or cannot load its file. A shard that is starting again is waited for.
        """
        return merge_found(answers_of(self._ask(version, queries, k)), k)

    def search_partial(
        self, version: int, queries: Floats32, k: int, *, timeout_s: float = 60.0
    ) -> PartialResult:
        """As search, but of the shards that answer within timeout_s, naming those that do not.

        A late call is taken back, unless its shard computes it already: it then goes on, and nobody hears of it.
        Raises RunError when none answers, and for queries or k that do not fit the version.
        """
        calls = self._ask(version, queries, k)
        _, late = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        found, missing, faults = [], [], [f"no shard answered within {timeout_s:g} s"]
        for number, call in enumerate(calls):
            try:
                if call in late:
                    missing.append(number)
                    ray.cancel(call)
                else:
                    found.append(ray.get(call))
            except ValueError as error:  # a request that no shard could answer
                raise fault_of(number, error) from error
            except RayError as error:
                missing.append(number)
                faults.append(str(fault_of(number, error)))
        if not found:
            raise RunError(faults[-1])
        return PartialResult(*merge_found(found, k), tuple(missing))

    def _ask(self, version: int, queries: Floats32, k: int) -> list[Any]:
        shared = ray.put(queries)
        return [
            shard.search.options(concurrency_group="search").remote(version, shared, k)
            for shard in self.shards
        ]


def answers_of(calls: Sequence[Any], twins: Sequence[Any] = ()) -> list[Any]:
    """The answers of all shards. Raises RunError for the first that failed, when all have ended.

    twins: second results of the same calls, which fail with them; Ray prints an error that nobody looked at.
    """
    answers, faults = [], []
    for number, call in enumerate(calls):
        try:
            answers.append(ray.get(call))
        except RayError as error:
            faults.append((number, error))
            with suppress(RayError):
                ray.get(list(twins[number : number + 1]))
    if faults:
        raise fault_of(*faults[0]) from faults[0][1]
    return answers


def fault_of(number: int, error: Exception) -> RunError:
    """What is raised for what went wrong with a shard."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, (RunError, ValueError)):
        return RunError(f"index shard {number}: {cause}")
    if isinstance(cause, RayError):
        return RunError(f"index shard {number} is dead: {str(cause).strip().splitlines()[0]}")
    return RunError(f"index shard {number} failed: {type(cause).__name__}: {cause}")
