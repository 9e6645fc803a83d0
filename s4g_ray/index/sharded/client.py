"""Search the shards of an index from any process of the cluster, and name a shard that fails."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.errors import RunError, first_line
from s4g_ray.index.sharded.sharding import merge_found
from s4g_ray.index.top_k import Found


@dataclass(frozen=True)
class PartialResult:
    """The merged answer of the shards that answered: ids[M, n], scores[M, n].

    n = k, or fewer when these shards hold fewer vectors together.
    """

    ids: Ints
    scores: Floats32
    missing_shards: tuple[int, ...]


@dataclass(frozen=True)
class IndexClient:
    """Searches all shards. Small and picklable: Ray tasks and Ray Data can carry it."""

    shards: tuple[Any, ...]

    def search(self, version: int, queries: Floats32, k: int) -> Found:
        """Search one version: queries[M, D] -> ids[M, k], scores[M, k] (cosine), best first.

        Equal scores are ordered by lower id. Waits for a shard that is starting again. Raises
        RunError for a version that is not in service, for queries or k that do not fit it, and for
        a shard that is dead or cannot load its file.
        """
        return merge_found(collect_answers(self._start_calls(version, queries, k)), k)

    def search_partial(
        self, version: int, queries: Floats32, k: int, *, timeout_s: float = 60.0
    ) -> PartialResult:
        """Search as `search` does, but merge only what shards answer within timeout_s.

        Cancels late calls. One that is already running finishes and its result is dropped. Raises
        RunError when no shard answers, and for queries or k that do not fit the version.
        """
        calls = self._start_calls(version, queries, k)
        _, late = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        found = []
        missing = []
        last_fault = f"no shard answered within {timeout_s:g} s"
        for number, call in enumerate(calls):
            try:
                if call in late:
                    missing.append(number)
                    ray.cancel(call)
                else:
                    found.append(ray.get(call))
            except ValueError as error:  # a request that no shard can answer
                raise shard_error(number, error) from error
            except RayError as error:
                missing.append(number)
                last_fault = str(shard_error(number, error))
        if not found:
            raise RunError(last_fault)
        return PartialResult(*merge_found(found, k), tuple(missing))

    def _start_calls(self, version: int, queries: Floats32, k: int) -> list[Any]:
        shared = ray.put(queries)
        return [
            shard.search.options(concurrency_group="search").remote(version, shared, k)
            for shard in self.shards
        ]


def collect_answers(calls: Sequence[Any], second_results: Sequence[Any] = ()) -> list[Any]:
    """Wait for all calls and return their answers, one a shard.

    second_results: references to second results of the same calls. Where a call fails they are
    fetched too, because Ray prints each error that nobody has fetched. Raises RunError for the
    first shard that failed, once all calls have ended.
    """
    answers = []
    faults = []
    for number, call in enumerate(calls):
        try:
            answers.append(ray.get(call))
        except RayError as error:
            faults.append((number, error))
            with suppress(RayError):
                ray.get(list(second_results[number : number + 1]))
    if faults:
        number, first_error = faults[0]
        raise shard_error(number, first_error) from first_error
    return answers


def shard_error(number: int, error: Exception) -> RunError:
    """Return the RunError to raise for an error of a shard: its number and the cause."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, (RunError, ValueError)):
        return RunError(f"index shard {number}: {cause}")
    if isinstance(cause, RayError):
        return RunError(f"index shard {number} is dead: {first_line(cause)}")
    return RunError(f"index shard {number} failed: {type(cause).__name__}: {cause}")
