"""Coordinator: a thread that runs rounds beside training and picks each epoch's graph.

The decision is made once, for all ranks. The coordinator knows neither Ray nor what a round does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, Self

from s4g_ray.errors import GpuMemoryError, InputError, RunError, run_error_of
from s4g_ray.pipeline.rounds.schedule import GEOGRAPHIC, Schedule

END_S = 10.0  # for a round in progress whose actors are gone
POLL_S = 0.2  # between two checks whether a wait must end


class Rounds(Protocol):
    """The work of a round, as the coordinator calls it.

    A RunError, an OSError and any error of Ray are worth another try; a GpuMemoryError and an
    InputError are not.
    """

    def mine(self, epoch: int) -> None:
        """Publish the graphs mined from an epoch's checkpoint."""
        ...

    def evaluate(self, epoch: int) -> None:
        """Score an epoch's checkpoint."""
        ...

    def failed(self, what: str, epoch: int, attempt: int, error: RunError, last: bool) -> None:
        """Report a failed try; after the last one the run continues without the round."""
        ...


class Coordinator:
    """Runs rounds in the order in which graphs are needed; a context manager that ends the thread.

    ready: versions of graphs that are published already. All methods may be called from any thread.
    """

    def __init__(
        self,
        schedule: Schedule,
        rounds: Rounds,
        *,
        ready: set[int] | None = None,
        first_epoch: int = 1,
    ) -> None:
        self._schedule = schedule
        self._rounds = rounds
        self._ready = {GEOGRAPHIC, *(ready or ())}
        self._mining: list[int] = []  # epochs whose checkpoints wait to be mined
        self._evaluating: list[int] = []
        self._running: int | None = None  # epoch of the round in progress
        self._failures: dict[int, RunError] = {}  # of mining rounds after their last try
        self._fatal: BaseException | None = None
        self._next = first_epoch  # the epoch whose graph is chosen next
        self._chosen: dict[int, int] = {}  # epoch -> version of the graph chosen for it
        self._num_ended = 0  # rounds
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="coordinator", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._thread.join(END_S)

    def end(self) -> None:
        """Start no more rounds. Does not wait for the one in progress."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def submit(self, epoch: int, *, mining: bool, evaluating: bool) -> None:
        """Queue the round of an epoch whose checkpoint is published."""
        with self._changed:
            if mining:
                self._mining.append(epoch)
            if evaluating:
                self._evaluating.append(epoch)
            self._changed.notify_all()

    def graph_for(
        self, epoch: int, *, late: Callable[[], bool], check: Callable[[], None]
    ) -> int | None:
        """Wait for the graph that an epoch uses and return its version; None in mode random.

        late(): whether the epoch could begin now, so that an older graph may replace one that is
        not published yet. A synchronous schedule waits for all rounds. check() is called while
        waiting and may raise. Raises the error that ended a round, and RunError when no graph is
        young enough.
        """
        due = self._schedule.version_for(epoch)
        with self._changed:
            self._next = epoch
            while True:
                check()
                self._raise_fatal()
                if self._schedule.overlaps or not self._is_busy():
                    version = due
                    if due is not None and due not in self._ready:
                        version = self._find_older(epoch, due, late())
                    if version is not None:
                        self._chosen[epoch] = version
                    if due is None or version is not None:
                        return version
                self._changed.wait(POLL_S)

    def _find_older(self, epoch: int, due: int, late: bool) -> int | None:
        """Return an older graph for an epoch, if one may be used now."""
        failure = self._failures.get(due)
        may_reuse = late and self._schedule.config.mining.when_late == "reuse"
        if failure is None and not may_reuse:
            return None
        version = self._schedule.reusable(epoch, self._ready)
        if version is None and failure is not None:
            bound = self._schedule.config.mining.staleness_bound
            raise RunError(
                f"epoch {epoch} has no graph: the mining round after epoch {due} failed"
                f" ({failure}), and the graphs there are older than"
                f" mining.max_staleness_epochs={bound}; fix the cause and resume"
            ) from failure
        return version

    def finish(self, check: Callable[[], None]) -> None:
        """Wait for all rounds. Raises the error that ended one."""
        with self._changed:
            while self._is_busy():
                check()
                self._changed.wait(POLL_S)
            self._raise_fatal()

    def check(self) -> None:
        """Raise the error that ended a round, if any."""
        with self._changed:
            self._raise_fatal()

    def waiting(self) -> set[int]:
        """Return the epochs whose checkpoints are still needed.

        Rounds to come need them, or a resumed run that repeats a failed round.
        """
        with self._changed:
            needed = {*self._mining, *self._evaluating}
            if self._running is not None:
                needed.add(self._running)
            newest = max(self._ready)
            needed.update(epoch for epoch in self._failures if epoch > newest)
            return needed

    @property
    def ready(self) -> set[int]:
        """The versions of graphs that an epoch may use."""
        with self._changed:
            return set(self._ready)

    def chosen_after(self, epoch: int) -> set[int]:
        """Return the versions of the graphs chosen for later epochs, which may be read now."""
        with self._changed:
            return {version for later, version in self._chosen.items() if later > epoch}

    @property
    def num_ended(self) -> int:
        """The number of rounds that have ended, done or given up."""
        with self._changed:
            return self._num_ended

    @property
    def queue_length(self) -> int:
        """The number of epochs whose rounds have not begun."""
        with self._changed:
            return len({*self._mining, *self._evaluating})

    def _is_busy(self) -> bool:
        has_work = bool(self._mining or self._evaluating) or self._running is not None
        return self._fatal is None and has_work

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _work(self) -> None:
        try:
            while (task := self._take()) is not None:
                self._run(*task)
        except BaseException as error:  # raised again in the thread that waits or checks next
            fatal: BaseException = error
            if not isinstance(error, Exception):
                fatal = RunError(f"the coordinator died: {error!r}")
            with self._changed:
                self._fatal = fatal
                self._running = None
                self._changed.notify_all()

    def _take(self) -> tuple[int, bool, bool] | None:
        """Wait for the next round: (epoch, mining, evaluating); None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._mining or self._evaluating)
            if self._ended:
                return None
            due = self._schedule.version_for(self._next) or 0
            late = [version for version in self._mining if version <= due]
            if late:
                # an epoch waits for the newest of these; no epoch will use the older ones
                epoch = max(late)
                self._mining = [version for version in self._mining if version >= epoch]
            else:
                epoch = min([*self._mining, *self._evaluating])
            task = (epoch, epoch in self._mining, epoch in self._evaluating)
            self._mining = [version for version in self._mining if version != epoch]
            self._evaluating = [version for version in self._evaluating if version != epoch]
            self._running = epoch
            return task

    def _run(self, epoch: int, mining: bool, evaluating: bool) -> None:
        if mining:
            failure = self._try("mining", self._rounds.mine, epoch)
            if failure is not None and not self._schedule.overlaps:
                raise failure
            with self._changed:
                if failure is None:
                    self._ready.add(epoch)
                else:
                    self._failures[epoch] = failure
                self._changed.notify_all()
        if evaluating and not self._ended:
            failure = self._try("evaluation", self._rounds.evaluate, epoch)
            if failure is not None and epoch == self._schedule.epochs:
                raise failure  # a run must not end without its last evaluation
        with self._changed:
            self._running = None
            self._num_ended += 1
            self._changed.notify_all()

    def _try(self, what: str, work: Callable[[int], None], epoch: int) -> RunError | None:
        """Do the work, again after a failure; return the failure of the last try.

        Raises GpuMemoryError and InputError at once.
        """
        retries = self._schedule.config.mining.max_retries
        failure: RunError | None = None
        for attempt in range(retries + 1):
            try:
                work(epoch)
                return None
            except (GpuMemoryError, InputError):  # Ray's error of a task may be one of them too
                raise
            except RunError as error:
                failure = error
            except OSError as error:
                failure = RunError(f"{type(error).__name__}: {error}")
            except Exception as error:
                failure = run_error_of(error)
                if failure is None:
                    raise
            if self._ended:  # the actors were stopped during the try
                break
            self._rounds.failed(what, epoch, attempt + 1, failure, attempt == retries)
        return failure
