"""The coordinator: runs rounds beside the training, one after another, and says which graph an epoch uses.

It decides once for all ranks. It knows neither Ray nor what a round does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, Self

from s4g_ray.errors import RunError
from s4g_ray.pipeline.rounds.schedule import GEOGRAPHIC, Schedule

END_S = 10.0  # for a round in progress whose actors are gone
POLL_S = 0.2  # between two looks whether a wait is to be given up


class Rounds(Protocol):
    """The work of a round, as the coordinator asks for it; a RunError is worth another try."""

    def mine(self, epoch: int) -> None:
        """Publish the graphs mined from an epoch's checkpoint."""
        ...

    def evaluate(self, epoch: int) -> None:
        """Score an epoch's checkpoint."""
        ...

    def failed(self, what: str, epoch: int, attempt: int, error: RunError, last: bool) -> None:
        """A try has failed; after the last one the run goes on without."""
        ...


class Coordinator:
    """A thread that runs rounds in the order in which graphs are needed; a context manager that ends it.

    ready: versions of graphs that are published already. Everything is called from other threads.
    """

    def __init__(
        self,
        schedule: Schedule,
        rounds: Rounds,
        *,
        ready: set[int] | None = None,
        first_epoch: int = 1,
    ) -> None:
        self._schedule, self._rounds = schedule, rounds
        self._ready = {GEOGRAPHIC, *(ready or ())}
        self._mining: list[int] = []  # epochs whose rounds wait
        self._evaluating: list[int] = []
        self._running: int | None = None  # epoch of the round in progress
        self._failures: dict[int, RunError] = {}  # of mining rounds that were given up
        self._fatal: BaseException | None = None
        self._next = first_epoch  # the epoch whose graph is chosen next
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
        """No more rounds; what happens to the one in progress is nobody's concern."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def submit(self, epoch: int, *, mining: bool, evaluating: bool) -> None:
        """An epoch's checkpoint is published: its round may run."""
        with self._changed:
            self._mining += [epoch] * mining
            self._evaluating += [epoch] * evaluating
            self._changed.notify_all()

    def graph_for(
        self, epoch: int, *, late: Callable[[], bool], check: Callable[[], None]
    ) -> int | None:
        """The graph that an epoch uses, waited for; None without neighbors.

        late(): whether the epoch could begin now, so that a graph that is not there yet may be replaced by an older
        one. In a synchronous schedule all rounds are waited for. check() is called while waiting and may raise.
        Raises what a round has died of, and RunError when no graph is young enough.
        """
        due = self._schedule.version_for(epoch)
        with self._changed:
            self._next = epoch
            while True:
                check()
                self._raise_fatal()
                if self._schedule.overlaps or not self._is_busy():
                    if due is None or due in self._ready:
                        return due
                    if (version := self._stand_in(epoch, due, late())) is not None:
                        return version
                self._changed.wait(POLL_S)

    def _stand_in(self, epoch: int, due: int, late: bool) -> int | None:
        """An older graph for an epoch, where one may be used now."""
        failure = self._failures.get(due)
        if failure is None and not (late and self._schedule.config.mining.when_late == "reuse"):
            return None
        version = self._schedule.reusable(epoch, self._ready)
        if version is None and failure is not None:
            bound = self._schedule.config.mining.staleness_bound
            raise RunError(
                f"epoch {epoch} has no graph: the mining round after epoch {due} failed ({failure}), and those there"
                f" are older than max_staleness_epochs={bound}; mend the cause and resume"
            ) from failure
        return version

    def finish(self, check: Callable[[], None]) -> None:
        """Wait for all rounds. Raises what one has died of."""
        with self._changed:
            while self._is_busy():
                check()
                self._changed.wait(POLL_S)
            self._raise_fatal()

    def check(self) -> None:
        """Raises what a round has died of."""
        with self._changed:
            self._raise_fatal()

    def waiting(self) -> set[int]:
        """Epochs whose checkpoints are still needed: by rounds to come, or by a resumed run for one that failed."""
        with self._changed:
            running = set() if self._running is None else {self._running}
            failed = {epoch for epoch in self._failures if epoch > max(self._ready)}
            return {*self._mining, *self._evaluating, *running, *failed}

    @property
    def queue_length(self) -> int:
        """Epochs whose rounds wait to be begun."""
        with self._changed:
            return len({*self._mining, *self._evaluating})

    def _is_busy(self) -> bool:
        return self._fatal is None and bool(
            self._mining or self._evaluating or self._running is not None
        )

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _work(self) -> None:
        try:
            while (task := self._take()) is not None:
                self._run(*task)
        except BaseException as error:  # handed to whoever waits or looks next
            with self._changed:
                self._fatal = (
                    error
                    if isinstance(error, Exception)
                    else RunError(f"the coordinator died: {error!r}")
                )
                self._running = None
                self._changed.notify_all()

    def _take(self) -> tuple[int, bool, bool] | None:
        """The next round, as (epoch, mining, evaluating), once there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._mining or self._evaluating)
            if self._ended:
                return None
            late = [v for v in self._mining if v <= (self._schedule.version_for(self._next) or 0)]
            if (
                late
            ):  # the newest of those that an epoch waits for; no epoch will use the older ones
                self._mining = [v for v in self._mining if v >= max(late)]
            epoch = max(late) if late else min([*self._mining, *self._evaluating])
            task = epoch, epoch in self._mining, epoch in self._evaluating
            self._mining = [v for v in self._mining if v != epoch]
            self._evaluating = [v for v in self._evaluating if v != epoch]
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
                raise failure  # a run ends with what it reached
        with self._changed:
            self._running = None
            self._changed.notify_all()

    def _try(self, what: str, work: Callable[[int], None], epoch: int) -> RunError | None:
        """Do it, again where it fails; what it failed with at last."""
        retries = self._schedule.config.mining.max_retries
        failure: RunError | None = None
        for attempt in range(retries + 1):
            try:
                work(epoch)
                return None
            except (RunError, OSError) as error:
                failure = (
                    error
                    if isinstance(error, RunError)
                    else RunError(f"{type(error).__name__}: {error}")
                )
                if self._ended:  # its actors were stopped under it
                    break
                self._rounds.failed(what, epoch, attempt + 1, failure, attempt == retries)
        return failure
