from __future__ import annotations

import pytest

from s4g_ray.errors import RunError
from s4g_ray.mining.stall_guard import FLOOR_S, PATIENCE, StallGuard, expected_block_s


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_job_may_pause_many_times_as_long_as_it_did_before() -> None:
    clock = Clock()
    guard = StallGuard(0.0, clock)
    for step in range(1, 6):  # blocks of half an hour, which the floor alone would not allow
        clock.now = 3000.0 * step
        guard.check(step)
    assert guard.limit_s == PATIENCE * 3000
    clock.now += PATIENCE * 3000
    guard.check(5)
    clock.now += 1
    with pytest.raises(RunError, match=r"for 60001 s, at most 60000 s are expected"):
        guard.check(5)


def test_the_first_block_may_take_what_its_cost_suggests_and_short_blocks_the_floor() -> None:
    clock = Clock()
    guard = StallGuard(expected_block_s(4_000_000, 1024, 1000, 2), clock)
    guard.check(("nothing",))
    clock.now = 1638.0
    guard.check(("nothing",))
    assert guard.limit_s == FLOOR_S
    slow = StallGuard(expected_block_s(10**8, 1024, 1000, 2), clock)
    assert slow.limit_s == pytest.approx(40_960)
    clock.now = 1639.0
    guard.check(("a block",))
    clock.now = 1639.1
    guard.check(("another",))
    assert guard.limit_s == PATIENCE * 1639
