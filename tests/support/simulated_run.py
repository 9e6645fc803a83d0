"""A run without images: its epochs, plans, rounds, crashes and removals, in any order.

An oracle for what a run reads. Training, planning and rounds are generators that yield between two
of their steps; a random order of the steps stands for threads. Files are numbers in sets. The rule
of retention is applied where the driver applies it, and every read checks that its file is there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator

from s4g_ray.pipeline.retention.artefacts import Keep
from s4g_ray.pipeline.retention.rule import (
    RunState,
    removable_embeddings,
    removable_graphs,
    removable_plans,
)
from s4g_ray.pipeline.rounds.schedule import Schedule

Steps = Iterator[None]


class StoppedError(Exception):
    """The run ends with an error of its own, as it should."""


class SimulatedRun:
    """Runs until its last epoch; `crashes` times everything in memory is lost in between."""

    def __init__(
        self, schedule: Schedule, keep: Keep, *, seed: int, crashes: int, failures: float
    ) -> None:
        self.schedule = schedule
        self.keep = keep
        self.rng = random.Random(seed)
        self.num_kept = schedule.config.checkpoint.keep
        self.crashes = crashes
        self.failures = failures  # the probability that a mining round is given up
        self.checkpoints = {0}
        self.embeddings: set[int] = set()
        self.graphs: set[int] = set()
        self.plans: set[int] = set()
        self.mined: set[int] = set()  # lines of metrics.jsonl
        self.evaluated: set[int] = set()
        self.ever_mined: set[int] = set()
        self.best = 0
        self.is_over = False
        self.planner: Steps | None = None
        self.running: int | None = None
        self.most = {"checkpoints": 0, "embeddings": 0, "graphs": 0, "plans": 0}

    def run(self) -> None:
        """Run all epochs. Raises AssertionError where a file is missing that something reads."""
        while True:
            try:
                if self._live():
                    return
            except StoppedError:
                return

    def _live(self) -> bool:
        """Run from the newest checkpoint until the end (true) or a crash."""
        self._resume()
        tasks: list[Steps] = [self._train(), self._do_rounds()]
        speeds = [self.rng.choice([1, 5, 25]) for _ in range(3)]  # of training, rounds, planning
        crash_at = self.rng.randrange(5, 200) if self.crashes else -1
        step = 0
        while not self.is_over:
            step += 1
            assert step < 100_000, "the simulated run is stuck"
            if step == crash_at:
                self.crashes -= 1
                return False
            number = self.rng.choices(range(3), speeds)[0]
            if number < 2:
                next(tasks[number], None)
            elif self.planner is not None and next(self.planner, "ended") == "ended":
                self.planner = None
            self._check_readers()
        return True

    def _resume(self) -> None:
        self.newest = max(self.checkpoints)
        for kept in (self.embeddings, self.graphs, self.plans, self.mined, self.evaluated):
            kept -= {version for version in kept if version > self.newest}
        self.ever_mined &= set(range(self.newest + 1))
        self.best = min(self.best, self.newest)
        past = range(self.newest + 1)
        self.ready = {0, *(self.graphs & self.mined)}
        self.chosen: dict[int, int] = {}
        self.failed: set[int] = set()
        self.mining: list[int] = []
        self.evaluating: list[int] = []
        self.running = None
        self.next = self.newest + 1
        self.planned: set[int] = set()
        self.planner = None
        self.is_over = False
        oldest = self.schedule.version_for(self.newest + 1) or 0
        for epoch in past:
            self._submit(epoch, oldest)
        if self.newest:
            assert self.newest in self.plans  # the record of an epoch that was not logged

    def _submit(self, epoch: int, oldest: int = 0) -> None:
        is_mined = epoch in self.graphs and epoch in self.mined
        if epoch >= oldest and self.schedule.mines_after(epoch) and not is_mined:
            self.mining.append(epoch)
        due = self.schedule.evaluates_after(epoch) and epoch not in self.evaluated
        if due and epoch in self.checkpoints:
            self.evaluating.append(epoch)

    @property
    def is_busy(self) -> bool:
        return bool(self.mining or self.evaluating) or self.running is not None

    def _train(self) -> Steps:
        for epoch in range(self.newest + 1, self.schedule.epochs + 1):
            for wanted in (epoch, epoch + 1):
                if wanted == epoch or (
                    wanted <= self.schedule.epochs and self.schedule.plans_ahead(epoch)
                ):
                    while wanted not in self.planned and self.planner is not None:
                        yield
                    if wanted not in self.planned:
                        self.planner = self._plan(wanted)
                while wanted == epoch and wanted not in self.planned:
                    yield
            assert epoch in self.plans
            yield
            self.checkpoints.add(epoch)  # by a worker
            yield
            self.newest = epoch
            self._submit(epoch)
            self._prune_checkpoints()
            self._apply()
            yield
        while self.is_busy:
            yield
        self._prune_checkpoints()
        self._apply()
        self.is_over = True

    def _plan(self, epoch: int) -> Steps:
        self.next = epoch
        version = yield from self._choose(epoch)
        yield
        if version:
            self._read("graph", self.graphs, version)
        elif version == 0:
            self.graphs.add(0)
        for _ in range(self.rng.randrange(1, 10)):
            yield
            if version is not None:
                self._read("graph", self.graphs, version)
        self.plans.add(epoch)
        self.planned.add(epoch)

    def _choose(self, epoch: int) -> Generator[None, None, int | None]:
        due = self.schedule.version_for(epoch)
        while True:
            if self.schedule.overlaps or not self.is_busy:
                if due is None:
                    return None
                version: int | None = due if due in self.ready else None
                late = self.newest >= epoch - 1
                reuses = late and self.schedule.config.mining.when_late == "reuse"
                if version is None and (due in self.failed or reuses):
                    version = self.schedule.reusable(epoch, self.ready)
                    if version is None and due in self.failed:
                        raise StoppedError
                if version is not None:
                    self.chosen[epoch] = version
                    return version
            yield

    def _do_rounds(self) -> Steps:
        while True:
            if not (self.mining or self.evaluating):
                yield
                continue
            due = self.schedule.version_for(self.next) or 0
            late = [version for version in self.mining if version <= due]
            if late:
                self.mining = [version for version in self.mining if version >= max(late)]
                epoch = max(late)
            else:
                epoch = min([*self.mining, *self.evaluating])
            mines = epoch in self.mining
            evaluates = epoch in self.evaluating
            self.mining = [version for version in self.mining if version != epoch]
            self.evaluating = [version for version in self.evaluating if version != epoch]
            self.running = epoch
            if mines:
                yield from self._mine(epoch)
            if evaluates:
                yield from self._evaluate(epoch)
            self.running = None
            self._apply()
            yield

    def _mine(self, epoch: int) -> Steps:
        if (
            epoch not in self.checkpoints | self.embeddings
        ):  # of a round that an earlier life gave up
            self.failed.add(epoch)
            return
        self._embed(epoch)
        yield
        previous = max((v for v in self.graphs if v < epoch), default=None)
        for _ in range(self.rng.randrange(1, 30)):
            self._read("embeddings", self.embeddings, epoch)
            if previous is not None:
                self._read("graph", self.graphs, previous)
            yield
        if self.rng.random() < self.failures:
            if not self.schedule.overlaps:
                raise StoppedError
            self.failed.add(epoch)
            return
        self.graphs.add(epoch)
        yield
        self.mined.add(epoch)
        self.ever_mined.add(epoch)
        yield
        self.ready.add(epoch)

    def _evaluate(self, epoch: int) -> Steps:
        self._embed(epoch)
        for _ in range(self.rng.randrange(1, 10)):
            self._read("embeddings", self.embeddings, epoch)
            yield
        self.evaluated.add(epoch)
        if self.rng.random() < 0.3:
            self.best = epoch

    def _embed(self, epoch: int) -> None:
        if epoch not in self.embeddings:
            self._read("checkpoint", self.checkpoints, epoch)
            self.embeddings.add(epoch)

    def _waiting(self) -> set[int]:
        needed = {*self.mining, *self.evaluating}
        if self.running is not None:
            needed.add(self.running)
        return needed | {epoch for epoch in self.failed if epoch > max(self.ready)}

    def _prune_checkpoints(self) -> None:
        self.most["checkpoints"] = max(self.most["checkpoints"], len(self.checkpoints))
        newest = sorted(self.checkpoints - {0})[-self.num_kept :]
        self.checkpoints &= {0, self.best, *newest, *self._waiting(), self.newest}

    def _apply(self) -> None:
        newest = max(self.checkpoints)
        state = RunState(
            newest,
            frozenset(self.checkpoints),
            frozenset(self.ready),
            frozenset(v for epoch, v in self.chosen.items() if epoch > newest),
            frozenset(self._waiting()),
            max(self.evaluated, default=None),
        )
        removed: dict[str, Callable[[], list[int]]] = {
            "embeddings": lambda: removable_embeddings(
                state, self.embeddings, self.keep.embeddings
            ),
            "graphs": lambda: removable_graphs(self.schedule, state, self.graphs, self.keep.graphs),
            "plans": lambda: removable_plans(state, self.plans, self.keep.plans),
        }
        for name, find in removed.items():
            kept: set[int] = getattr(self, name)
            self.most[name] = max(self.most[name], len(kept))
            kept -= set(find())

    def _check_readers(self) -> None:
        """Check what other processes read at any time: workers, the report, a branch."""
        for epoch in self.planned:
            assert epoch in self.plans or epoch < max(self.checkpoints)
        if self.evaluated:
            self._read("embeddings of the report", self.embeddings, max(self.evaluated))
        for start in self.checkpoints:
            for epoch in range(start + 1, start + 2 + self.schedule.config.mining.lag):
                version = self.schedule.version_for(epoch)
                if version and version <= start and version in self.ever_mined:
                    self._read(f"graph of a branch from {start}", self.graphs, version)

    def _read(self, what: str, files: set[int], version: int) -> None:
        assert version in files, f"{what} {version} is removed; there are {sorted(files)}"
