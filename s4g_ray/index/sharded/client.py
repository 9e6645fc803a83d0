"""Search the shards of an index from any process of the cluster, and name a shard that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.area import Area
from s4g_ray.errors import RunError, UnavailableError, first_line
from s4g_ray.index.sharded.merging import ShardAnswer, merge_found, search_filled
from s4g_ray.index.top_k import Found

PATIENCE_S = 5.0  # a call that takes longer may wait for a shard that is lost


class LostShardError(UnavailableError):
    """The error of a shard that died and does not start again in time."""


@dataclass(frozen=True)
class PartialResult:
    """The merged answer of the shards that answered: ids[M, n], scores[M, n].

    n = k, or fewer when these shards hold fewer vectors together. Padded with id -1 and score -inf
    where they find fewer.
    """

    ids: Ints
    scores: Floats32
    missing_shards: tuple[int, ...]


@dataclass(frozen=True)
class IndexClient:
    """Searches all shards. Small and picklable: Ray tasks and Ray Data can carry it.

    demand: what each shard asks of the cluster, for messages.
    """

    shards: tuple[Any, ...]
    demand: str = "its resources"
    start_timeout_s: float = 120.0

    def search(
        self,
        version: int,
        queries: Floats32,
        k: int,
        *,
        ids: Ints | None = None,
        area: Area | None = None,
    ) -> Found:
        """Search one version: queries[M, D] -> ids[M, k], scores[M, k] (cosine), best first.

        Equal scores are ordered by lower id. ids (ascending) and area restrict the search; where
        they allow fewer than k vectors, results are padded with id -1 and score -inf. Waits for a
        shard that is starting again, up to start_timeout_s. Raises RunError for a version that is
        not in service, for queries or k that do not fit it, and for a shard that is dead, lost or
        cannot load its file.
        """
        allowed = None if ids is None else ray.put(ids)

        def ask(some: Floats32, effort: int | None) -> Sequence[ShardAnswer]:
            start = self._starter(version, some, k, effort, allowed, area)
            return self.collect([start(n) for n in range(len(self.shards))], again=start)

        found, _ = search_filled(ask, queries, k, None)
        return found

    def search_partial(
        self,
        version: int,
        queries: Floats32,
        k: int,
        *,
        ids: Ints | None = None,
        area: Area | None = None,
        timeout_s: float = 60.0,
    ) -> PartialResult:
        """Search as `search` does, but once, and merge only what shards answer within timeout_s.

        Cancels late calls. One that is already running finishes and its result is dropped. Raises
        RunError when no shard answers, and for queries or k that do not fit the version.
        """
        allowed = None if ids is None else ray.put(ids)
        start = self._starter(version, queries, k, None, allowed, area)
        calls = [start(number) for number in range(len(self.shards))]
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
                    answer: ShardAnswer = ray.get(call)
                    found.append((answer.ids, answer.scores))
            except ValueError as error:  # a request that no shard can answer
                raise shard_error(number, error) from error
            except RayError as error:
                missing.append(number)
                last_fault = str(shard_error(number, error))
        if not found:
            raise RunError(last_fault)
        return PartialResult(*merge_found(found, k), tuple(missing))

    def is_alive(self) -> bool:
        """Return whether all shards answer within PATIENCE_S."""
        calls = [shard.__ray_ready__.remote() for shard in self.shards]
        _, late = ray.wait(calls, num_returns=len(calls), timeout=PATIENCE_S)
        with suppress(RayError):
            ray.get([call for call in calls if call not in late])
            return not late
        return False

    def _starter(
        self,
        version: int,
        queries: Floats32,
        k: int,
        effort: int | None,
        allowed: Any,
        area: Area | None,
    ) -> Callable[[int], Any]:
        """Return a function that starts a search on the shard of a number."""
        shared = ray.put(queries)

        def start(number: int) -> Any:
            call = self.shards[number].search.options(concurrency_group="search")
            return call.remote(version, shared, k, effort, allowed, area)

        return start

    def collect(
        self,
        calls: Sequence[Any],
        second_results: Sequence[Any] = (),
        again: Callable[[int], Any] | None = None,
    ) -> list[Any]:
        """Wait for one call of each shard and return the answers.

        again: makes the call of a shard once more, where Ray gave it up while the shard was out of
        reach (its node is gone, and Ray retries for seconds only). second_results: references to
        second results of the same calls. Where a call fails they are fetched too, because Ray
        prints each error that nobody has fetched. Raises RunError for the first shard that failed,
        once all calls have ended, and LostShardError for one that does not start again within
        start_timeout_s.
        """
        self._await_calls(dict(enumerate(calls)), self.start_timeout_s)
        answers: dict[int, Any] = {}
        faults: dict[int, RayError] = {}
        for number, call in enumerate(calls):
            try:
                answers[number] = ray.get(call)
            except RayError as error:
                faults[number] = error
                with suppress(RayError):
                    ray.get(list(second_results[number : number + 1]))
        if again is not None:
            answers.update(self._repeat(again, faults))
        if faults:
            number, first_error = next(iter(faults.items()))
            raise shard_error(number, first_error) from first_error
        return [answers[number] for number in range(len(calls))]

    def _repeat(self, again: Callable[[int], Any], faults: dict[int, RayError]) -> dict[int, Any]:
        """Repeat the calls of shards that are out of reach, for up to start_timeout_s.

        Returns the answers, by shard, and takes their faults out.
        """
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            away = [n for n, error in faults.items() if isinstance(error, ActorUnavailableError)]
            if not away:
                break
            calls = {number: again(number) for number in away}
            self._await_calls(calls, deadline - time.monotonic())
            for number, call in calls.items():
                try:
                    answers[number] = ray.get(call)
                    del faults[number]
                except RayError as error:
                    faults[number] = error
        return answers

    def _await_calls(self, calls: Mapping[int, Any], timeout_s: float) -> None:
        """Wait for calls, by shard, as long as the shards that have not answered live.

        A call may take hours; a shard that is working answers another, empty call meanwhile. One
        that is starting again answers when it has started. Raises LostShardError for one that does
        not within timeout_s.
        """
        patience_s = min(PATIENCE_S, max(timeout_s, 0.0) / 2)
        every = list(calls.values())
        while True:
            waiting_since = time.monotonic()
            _, late = ray.wait(every, num_returns=len(every), timeout=patience_s)
            if not late:
                return
            numbers = [number for number, call in calls.items() if call in late]
            signs = [self.shards[number].__ray_ready__.remote() for number in numbers]
            left_s = max(timeout_s - (time.monotonic() - waiting_since), 0.0)
            _, silent = ray.wait(signs, num_returns=len(signs), timeout=left_s)
            _, late = ray.wait(every, num_returns=len(every), timeout=0)
            lost = [
                number
                for number, sign in zip(numbers, signs, strict=True)
                if sign in silent and calls[number] in late
            ]
            if lost:
                raise self._lost_error(lost)

    def _lost_error(self, numbers: Sequence[int]) -> LostShardError:
        return LostShardError(
            f"index shard {numbers[0]} is lost"
            + (f" ({len(numbers)} of {len(self.shards)} are)" if len(numbers) > 1 else "")
            + f": it did not start again within {self.start_timeout_s:g} s. Its node may be gone,"
            f" and no other has room for {self.demand}; add a node, free resources, or raise"
            " ray.start_timeout_s"
        )


def shard_error(number: int, error: Exception) -> RunError:
    """Return the RunError to raise for an error of a shard: its number and the cause."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, (RunError, ValueError)):
        return RunError(f"index shard {number}: {cause}")
    if isinstance(cause, RayError):
        return RunError(f"index shard {number} is dead: {first_line(cause)}")
    return RunError(f"index shard {number} failed: {type(cause).__name__}: {cause}")
