"""What Ray reports does not reach the terminal; what anything else prints does."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

from s4g_ray.distributed.ray_output import without_ray_lines

RAYLET: Any = {"lines": ["WARNING: 8 PYTHON worker processes\nhave been started."], "pid": "raylet"}
NATIVE = b"[2026-11-26 23:03:32,860 E 2830 2830] core_worker.cc:35: lost\n"


def test_no_line_of_ray_comes_through_and_every_other_one_does(
    capfd: pytest.CaptureFixture[str],
) -> None:
    worker: Any = ray._private.worker
    report = {**RAYLET, "is_err": False}
    worker.print_to_stdstream(report, ignore_prefix=False)
    assert "PYTHON worker processes" in capfd.readouterr().out  # without the filter it is shown
    with without_ray_lines():
        worker.print_to_stdstream(
            {**report, "lines": ["WARNING: 9 PYTHON workers"]}, ignore_prefix=False
        )
        print("a line of a callback")
        os.write(2, NATIVE)
        os.write(2, b"a warning\n")
    shown = capfd.readouterr()
    assert shown.out == "a line of a callback\n"
    assert shown.err == "a warning\n"
    worker.print_to_stdstream({**report, "lines": ["later"]}, ignore_prefix=False)
    assert "later" in capfd.readouterr().out
