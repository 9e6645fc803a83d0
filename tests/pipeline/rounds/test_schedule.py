"""The graph that an epoch uses follows the rule: mined from e, first used by e + 1 + lag."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from s4g_ray.pipeline.rounds.schedule import Schedule
from tests.conftest import tiny_config


def schedule(epochs: int = 20, mode: str = "similarity", **mining: Any) -> Schedule:
    config = tiny_config("x", "y", train={"epochs": epochs}, sampling={"mode": mode}, mining=mining)
    return Schedule(config)


@given(st.integers(1, 5), st.integers(0, 6), st.integers(1, 25))
def test_a_graph_is_used_from_lag_epochs_after_the_next_until_a_newer_one_is(
    every: int, lag: int, epochs: int
) -> None:
    made = schedule(epochs, schedule="overlap", every_epochs=every, lag_epochs=lag)
    used = 0
    for epoch in range(1, epochs + 1):
        used = max(
            [used, *(e for e in range(1, epochs + 1) if e % every == 0 and e + 1 + lag <= epoch)]
        )
        assert made.version_for(epoch) == used
    mined = {e for e in range(epochs + 1) if made.mines_after(e)}
    assert mined == {v for v in map(made.version_for, range(1, epochs + 1)) if v}


def test_a_synchronous_schedule_uses_a_graph_at_once_and_other_modes_mine_nothing() -> None:
    made = schedule(every_epochs=4, lag_epochs=3)
    assert [made.version_for(epoch) for epoch in (4, 5, 8, 9)] == [0, 4, 4, 8]
    for mode, version in (("random", None), ("geographic", 0)):
        other = schedule(mode=mode, every_epochs=1)
        assert {other.version_for(epoch) for epoch in range(1, 21)} == {version}
        assert not any(other.mines_after(epoch) for epoch in range(21))


def test_a_late_graph_is_replaced_by_the_newest_within_the_staleness_bound() -> None:
    made = schedule(schedule="overlap", every_epochs=2, lag_epochs=1, max_staleness_epochs=5)
    assert made.version_for(8) == 6
    assert made.reusable(8, {0, 2, 4, 7}) == 4
    assert made.reusable(8, {0, 2}) == 2
    assert made.age(2, 8) == 5
    assert made.reusable(9, {0, 2}) is None
    assert made.reusable(8, {0, 6}) == 6


def test_an_epoch_is_planned_ahead_unless_it_waits_for_a_round() -> None:
    config = tiny_config(
        "x", "y", train={"epochs": 20}, mining={"every_epochs": 4}, evaluation={"every_epochs": 3}
    )
    sync = Schedule(config)
    assert [epoch for epoch in range(1, 12) if not sync.plans_ahead(epoch)] == [3, 4, 6, 8, 9]
    overlap = schedule(every_epochs=4, schedule="overlap")
    assert all(overlap.plans_ahead(epoch) for epoch in range(1, 12))
