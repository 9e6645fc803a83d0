"""Warnings of NCCL reach the user, and no other output of workers."""

from __future__ import annotations

import os
import time

import pytest
import ray

from s4g_ray.distributed.worker_warnings import SHOWN, WarningFilter, shown_warnings

NCCL = "node7:{}:912 [0] NCCL WARN Connect to 10.0.0.{}<43215> failed : Connection refused"


def test_each_warning_is_found_once_whatever_its_numbers() -> None:
    warnings = WarningFilter()
    lines = ["step 4", NCCL.format(1, 2), NCCL.format(9, 8), "NCCL INFO Using network Socket", ""]
    assert warnings.find_new(lines) == [lines[1]]
    assert warnings.find_new(lines) == []
    timeout = "[rank1]:[E1126] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(..."
    assert warnings.find_new([timeout]) == [timeout]


def test_no_more_than_a_few_warnings_are_shown() -> None:
    lines = [f"NCCL WARN {chr(ord('a') + n) * 3}" for n in range(SHOWN + 5)]
    assert WarningFilter().find_new(lines) == lines[:SHOWN]


@pytest.mark.cluster
def test_a_warning_of_a_worker_reaches_the_driver_and_its_other_lines_do_not(
    ray_cluster: None,
) -> None:
    @ray.remote(num_cpus=0)
    def print_lines() -> None:
        os.write(1, b"something else\n" + NCCL.format(1, 2).encode() + b"\n")
        os.write(2, b"a line of stderr\n")

    shown: list[str] = []
    with shown_warnings(shown.append):
        ray.get(print_lines.remote())
        deadline = time.monotonic() + 60
        while not shown and time.monotonic() < deadline:
            time.sleep(0.05)
    assert len(shown) == 1
    assert shown[0].endswith(NCCL.format(1, 2))
