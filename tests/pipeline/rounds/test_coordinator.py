"""The coordinator's decisions, with rounds that end when the test says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import GetTimeoutError, RaySystemError, RayTaskError

from s4g_ray.errors import BadImageError, GpuMemoryError, RunError
from s4g_ray.pipeline.preemption import PreemptedError
from s4g_ray.pipeline.rounds.coordinator import Coordinator
from s4g_ray.pipeline.rounds.schedule import Schedule
from tests.conftest import tiny_config


class Held:
    """Rounds whose mining ends when it is released; `faults` are raised, one a try."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.gates: dict[int, threading.Event] = {}
        self.faults: dict[int, list[Exception]] = {}
        self.failures: list[tuple[str, int, int, bool]] = []

    def release(self, *epochs: int) -> None:
        for epoch in epochs:
            self.gates.setdefault(epoch, threading.Event()).set()

    def mine(self, epoch: int) -> None:
        self.order.append(f"mine {epoch}")
        assert self.gates.setdefault(epoch, threading.Event()).wait(60)
        if self.faults.get(epoch):
            raise self.faults[epoch].pop(0)

    def evaluate(self, epoch: int) -> None:
        self.order.append(f"evaluate {epoch}")
        if self.faults.get(-epoch):
            raise self.faults[-epoch].pop(0)

    def failed(self, what: str, epoch: int, attempt: int, error: RunError, last: bool) -> None:
        self.failures.append((what, epoch, attempt, last))


@contextmanager
def coordinator(
    held: Held, epochs: int = 12, ready: set[int] | None = None, **mining: Any
) -> Iterator[Coordinator]:
    settings = {"schedule": "overlap", "every_epochs": 1, "lag_epochs": 1, **mining}
    config = tiny_config("x", "y", train={"epochs": epochs}, mining=settings)
    with Coordinator(Schedule(config), held, ready=ready) as made:
        yield made


def ask(made: Coordinator, epoch: int, *, late: bool = False, wait_s: float = 60.0) -> int | None:
    """The graph of an epoch; TimeoutError when it is still waited for after a time."""
    deadline = time.monotonic() + wait_s

    def check() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    return made.graph_for(epoch, late=lambda: late, check=check)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_waiting_gives_each_epoch_the_graph_of_the_rule_however_late_it_comes() -> None:
    held = Held()
    with coordinator(held) as made:
        assert ask(made, 1) == ask(made, 2) == 0
        made.submit(1, mining=True, evaluating=False)
        with pytest.raises(TimeoutError):
            ask(made, 3, late=True, wait_s=0.3)
        held.release(1)
        assert ask(made, 3, late=True) == 1


def test_reuse_takes_the_newest_graph_that_is_there_until_it_is_too_old_and_then_waits() -> None:
    held = Held()
    with coordinator(held, when_late="reuse", max_staleness_epochs=3) as made:
        for epoch in (1, 2, 3, 4):
            made.submit(epoch, mining=True, evaluating=False)
        with pytest.raises(TimeoutError):  # before its epoch could begin, it is not late
            ask(made, 3, wait_s=0.3)
        assert ask(made, 3, late=True) == ask(made, 4, late=True) == 0
        with pytest.raises(TimeoutError):
            ask(made, 5, late=True, wait_s=0.3)  # the geographic graph would be 4 epochs old
        held.release(1, 3, 4)
        assert ask(made, 5, late=True) in (
            1,
            3,
        )  # 1 was running: it is young enough until 3 is there
        until(lambda: "mine 3" in held.order)
        assert "mine 2" not in held.order  # no epoch would use it any more


def test_a_failed_round_is_tried_again_then_reported_and_training_continues_until_the_bound() -> (
    None
):
    held = Held()
    held.faults[1] = [RunError("disk")] * 3
    held.faults[2] = [RunError("once")]
    held.release(1, 2)
    with coordinator(held, max_retries=2, max_staleness_epochs=2) as made:
        made.submit(1, mining=True, evaluating=False)
        assert ask(made, 3) == 0
        assert held.failures == [
            ("mining", 1, 1, False),
            ("mining", 1, 2, False),
            ("mining", 1, 3, True),
        ]
        made.submit(2, mining=True, evaluating=False)
        assert ask(made, 4) == 2
        held.faults[3], held.faults[4] = [RunError("disk")] * 3, [RunError("disk")] * 3
        held.release(3, 4)
        made.submit(3, mining=True, evaluating=False)
        assert ask(made, 5) == 2
        made.submit(4, mining=True, evaluating=False)
        with pytest.raises(
            RunError,
            match=r"epoch 6 .* after epoch 4 failed \(disk\).* mining\.max_staleness_epochs=2; fix",
        ):
            ask(made, 6)


def make_system_error(message: str) -> Exception:
    kind: Any = RaySystemError
    error: Exception = kind(message)
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ExecutionTimeoutError("Ray Data made no progress for 1800 s"), "no progress for 1800 s"),
        (make_system_error("the object store is full"), "the object store is full"),
        (GetTimeoutError(), "GetTimeoutError"),
    ],
)
def test_an_error_of_ray_is_tried_again_then_reported(error: Exception, reason: str) -> None:
    held = Held()
    held.faults[1] = [error, error]
    held.faults[2] = [error]
    held.release(1, 2)
    with coordinator(held, schedule="sync", lag_epochs=0, max_retries=1) as made:
        made.submit(2, mining=True, evaluating=False)
        assert ask(made, 3) == 2
        assert held.failures == [("mining", 2, 1, False)]
        made.submit(1, mining=True, evaluating=False)
        with pytest.raises(RunError, match=reason):
            ask(made, 2)
    assert held.failures[1:] == [("mining", 1, 1, False), ("mining", 1, 2, True)]


def make_task_error(cause: Exception) -> Exception:
    """Return what Ray raises for a task that raised the cause: an error of both types."""
    error: Any = RayTaskError
    both: Exception = error("embed", "its traceback", cause).as_instanceof_cause()
    return both


@pytest.mark.parametrize(
    "error",
    [
        BadImageError("id 3"),
        GpuMemoryError("no memory"),
        make_task_error(BadImageError("id 3")),
    ],
)
def test_an_error_that_no_second_try_can_fix_ends_the_run(error: Exception) -> None:
    held = Held()
    held.faults[1] = [error]
    held.release(1)
    with coordinator(held) as made:
        made.submit(1, mining=True, evaluating=False)
        with pytest.raises(type(error), match=str(error)):
            ask(made, 3)
        with pytest.raises(type(error), match=str(error)):
            made.check()
        with pytest.raises(type(error), match=str(error)):
            made.finish(lambda: None)
    assert held.failures == []


def test_a_synchronous_run_ends_when_the_last_try_of_a_round_fails() -> None:
    held = Held()
    held.faults[1] = [RunError("recall")] * 2
    held.release(1)
    with coordinator(held, schedule="sync", max_retries=1) as made:
        made.submit(1, mining=True, evaluating=False)
        with pytest.raises(RunError, match="recall"):
            ask(made, 2)
    assert held.failures == [("mining", 1, 1, False), ("mining", 1, 2, True)]


def test_the_death_of_the_thread_is_an_error_and_no_hang() -> None:
    held = Held()
    held.release(1)
    held.faults[1] = [SystemExit("gone")]  # type: ignore[list-item]
    with coordinator(held) as made:
        made.submit(1, mining=True, evaluating=False)
        with pytest.raises(RunError, match=r"the coordinator died: SystemExit\('gone'\)"):
            ask(made, 3)


def test_a_synchronous_schedule_waits_for_evaluations_too_and_the_end_waits_for_all() -> None:
    held = Held()
    with coordinator(held, schedule="sync") as made:
        made.submit(1, mining=True, evaluating=True)
        threading.Timer(0.2, held.release, [1]).start()
        assert ask(made, 2) == 1
        assert held.order == ["mine 1", "evaluate 1"]
        made.submit(2, mining=False, evaluating=True)
        made.finish(lambda: None)
        assert held.order[-1] == "evaluate 2"


def test_a_failed_evaluation_is_given_up_but_that_of_the_last_epoch_ends_the_run() -> None:
    held = Held()
    held.faults[-1], held.faults[-2] = [RunError("x")] * 3, [RunError("y")] * 3
    with coordinator(held, epochs=2) as made:
        made.submit(1, mining=False, evaluating=True)
        made.finish(lambda: None)
        assert held.failures[-1] == ("evaluation", 1, 3, True)
        made.submit(2, mining=False, evaluating=True)
        with pytest.raises(RunError, match="y"):
            made.finish(lambda: None)


def test_checkpoints_of_rounds_to_come_are_needed_and_others_are_not() -> None:
    held = Held()
    with coordinator(held) as made:
        for epoch in (1, 2):
            made.submit(epoch, mining=True, evaluating=False)
        until(lambda: held.order == ["mine 1"])
        assert made.waiting() == {1, 2}
        held.release(1)
        until(lambda: held.order == ["mine 1", "mine 2"])
        assert made.waiting() == {2}
        held.release(2)
        made.finish(lambda: None)
        assert made.waiting() == set()


def test_the_checkpoint_of_a_round_that_failed_stays_until_a_newer_graph_is_there() -> None:
    held = Held()
    held.faults[1] = [RunError("disk")]
    held.release(1, 2)
    with coordinator(held, max_retries=0) as made:
        made.submit(1, mining=True, evaluating=False)
        made.finish(lambda: None)
        assert made.waiting() == {1}
        made.submit(2, mining=True, evaluating=False)
        made.finish(lambda: None)
        assert made.waiting() == set()


def test_a_round_that_the_end_interrupts_is_neither_tried_again_nor_reported() -> None:
    held = Held()
    held.faults[1] = [RunError("its actors are gone")] * 3
    with coordinator(held) as made:
        made.submit(1, mining=True, evaluating=True)
        until(lambda: held.order == ["mine 1"])
        made.end()
        held.release(1)
    assert held.order[:1] == ["mine 1"]
    assert held.order.count("mine 1") == 1
    assert held.failures == []


def test_an_object_store_that_fails_for_a_moment_is_tried_again() -> None:
    held = Held()
    held.faults[1] = [ConnectionError("reset by peer")]
    held.release(1)
    with coordinator(held) as made:
        made.submit(1, mining=True, evaluating=False)
        assert ask(made, 3) == 1
    assert held.failures == [("mining", 1, 1, False)]


def test_a_resumed_run_mines_first_what_its_next_epoch_waits_for() -> None:
    held = Held()
    held.release(2, 4)
    config = tiny_config(
        "x",
        "y",
        train={"epochs": 12},
        mining={"schedule": "overlap", "every_epochs": 2, "lag_epochs": 1},
    )
    made = Coordinator(Schedule(config), held, first_epoch=6)
    made.submit(2, mining=True, evaluating=False)
    made.submit(4, mining=True, evaluating=False)
    with made:
        assert ask(made, 6) == 4
    assert held.order == ["mine 4"]


def test_a_wait_ends_when_its_check_raises() -> None:
    held = Held()

    def check() -> None:
        raise PreemptedError

    with coordinator(held) as made:
        made.submit(1, mining=True, evaluating=False)
        with pytest.raises(PreemptedError):
            made.graph_for(3, late=lambda: False, check=check)
        with pytest.raises(PreemptedError):
            made.finish(check)
        held.release(1)
