"""Run the tasks of a mining job: a bounded number at a time, with progress, each committed once.

Tasks are plain Ray tasks: Ray Data took 9 ms of the driver's processor time for each, these take 1
ms, and its guard against jobs without finished rows stopped jobs whose tasks were long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s4g_ray.errors import InputError, RunError, reason_of
from s4g_ray.mining.job_plan import MinedPart, OnBlock, Row
from s4g_ray.mining.report import Counts
from s4g_ray.mining.stall_guard import StallGuard
from s4g_ray.progress import Update
from s4g_ray.storage import files
from s4g_ray.storage.part_commits import WORK, Files, read_commit, write_commit

POLL_S = 1.0  # between two looks at the progress


class ProgressBoard:
    """An actor: what running tasks have done. Tasks post, the driver reads."""

    def __init__(self) -> None:
        self._done: dict[str, tuple[int, int]] = {}

    def post(self, task: str, num_queries: int, num_blocks: int) -> None:
        """Note how many queries and blocks a task has answered."""
        self._done[task] = (num_queries, num_blocks)

    def read(self, ended: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return the queries and blocks of the running tasks; forgets those that have ended."""
        for task in ended:
            self._done.pop(task, None)
        return dict(self._done)


@dataclass
class _Poster:
    """Posts the blocks of one task."""

    board: Any
    task: str
    num_queries: int = 0
    num_blocks: int = 0

    def __call__(self, num_queries: int) -> None:
        self.num_queries += num_queries
        self.num_blocks += 1
        self.board.post.remote(self.task, self.num_queries, self.num_blocks)


# a task: arguments that all tasks share, its own, and what to call after each block of queries
Task = Callable[[Any, Row, OnBlock], MinedPart]


@dataclass
class TaskRunner:
    """Runs tasks that write into the folder `target`; a context manager.

    key: of the values that determine what the tasks write; commits of another key are not reused.
    """

    target: str
    key: str
    num_at_once: int
    num_cpus: float
    num_queries: int
    guard: StallGuard
    on_progress: Update
    counts: Counts = field(default_factory=Counts)
    num_reused: int = 0
    _num_shown: int = 0
    _board: Any = None

    def __enter__(self) -> Self:
        node = ray.get_runtime_context().get_node_id()
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": -1,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
        }
        create: Any = ray.remote(**options)(ProgressBoard)
        self._board = create.remote()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RayError):
            ray.kill(self._board)

    def run(self, task: Task, name: str, shared: Any, rows: Sequence[Row]) -> list[MinedPart]:
        """Run a task for each row and return the outcomes, in the order of the rows.

        shared: a reference to what all tasks are handed. A row's task is committed under `name` and
        the row's number. Raises RunError for the first task that fails, and for any error of Ray.
        """
        try:
            outcomes = dict(self._run_bounded(task, name, shared, rows))
        except RayError as error:
            at = f"after {self.counts.queries} of {self.num_queries} queries"
            raise RunError(f"the mining job failed {at}: {reason_of(error)}") from error
        return [outcomes[row["number"]] for row in rows]

    def _run_bounded(
        self, task: Task, name: str, shared: Any, rows: Sequence[Row]
    ) -> Iterator[tuple[int, MinedPart]]:
        waiting = deque(rows)
        running: dict[Any, tuple[str, int]] = {}
        ended: list[str] = []
        start: Any = ray.remote(num_cpus=self.num_cpus, scheduling_strategy="SPREAD")(_run_task)
        try:
            while waiting or running:
                while waiting and len(running) < self.num_at_once:
                    row = waiting.popleft()
                    commit = f"{name}-{row['number']:05d}"
                    call = start.remote(
                        task, shared, row, self.target, commit, self.key, self._board
                    )
                    running[call] = (commit, row["number"])
                ready, _ = ray.wait(list(running), timeout=POLL_S)
                for call in ready:
                    commit, number = running.pop(call)
                    ended.append(commit)
                    yield number, self._add(ray.get(call))
                self._look(ended)
        finally:
            for call in running:
                ray.cancel(call)

    def _add(self, result: _Result) -> MinedPart:
        """Count the outcome of a task. Raises RunError with the message of a fault."""
        if result.fault:
            raise RunError(result.fault)
        self.counts += result.outcome.counts
        self.num_reused += result.is_reused
        return result.outcome

    def _look(self, ended: list[str]) -> None:
        """Report the progress. Raises RunError when there was none for too long."""
        try:
            running = ray.get(self._board.read.remote(list(ended)), timeout=POLL_S)
        except RayError:  # the board is starting, or its node is busy: no news of running tasks
            running = {}
        else:
            self.guard.check((len(ended), running))
        ended_queries = self.counts.queries
        done = ended_queries + sum(num_queries for num_queries, _ in running.values())
        # a task whose process died begins anew: the bar waits for it
        self._num_shown = max(self._num_shown, min(done, self.num_queries))
        self.on_progress(self._num_shown, self.num_queries)


@dataclass(frozen=True)
class _Result:
    """What a task returns. fault: the message of an input or run error."""

    outcome: MinedPart = field(default_factory=MinedPart)
    is_reused: bool = False
    fault: str = ""


def _run_task(
    task: Task, shared: Any, row: Row, target: str, name: str, key: str, board: Any
) -> _Result:
    """Return the outcome committed under that name with the same key, or compute and commit it."""
    work = files.join(target, WORK)
    uri = files.join(work, f"{name}.json")

    def files_of(outcome: MinedPart) -> Files:
        return [(target, outcome.part), (work, outcome.aside)]

    try:
        outcome = read_commit(uri, key, MinedPart.from_row, files_of)
        if outcome is not None:
            return _Result(outcome, is_reused=True)
        outcome = task(shared, row, _Poster(board, name))
        write_commit(uri, key, outcome)
    except (RunError, InputError) as error:
        return _Result(fault=str(error))
    return _Result(outcome)
