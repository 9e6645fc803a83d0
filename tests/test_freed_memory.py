"""Processes that keep the memory that they free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from s4g_ray.freed_memory import VARIABLES, keeping_variables

BLOCK = 2**26  # bytes
# prints how often the kernel gave a page while a thread took and freed BLOCK bytes ten times more
SCRIPT = f"""
import resource, sys, threading
if sys.argv[1] == "by a call":
    from s4g_ray.freed_memory import keep_freed_memory
    keep_freed_memory()
def use():
    for _ in range(10):
        bytearray({BLOCK})
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
faults = []
thread = threading.Thread(target=use)
thread.start()
thread.join()
print(faults[-1] - faults[0])
"""


def count_pages(how: str, **variables: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other mallocs have other rules")
def test_large_blocks_are_used_again_without_new_pages_of_the_kernel() -> None:
    pages = count_pages("as it is")  # small ones or huge ones, as the system is set
    assert pages > 100
    assert count_pages("by variables", **VARIABLES) < pages / 10
    assert count_pages("by a call") < pages / 10
    assert count_pages("by a call", MALLOC_TRIM_THRESHOLD_="100000") > pages / 2  # as users want


def test_a_user_who_sets_a_variable_has_chosen(
    malloc_not_chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keeping_variables() == VARIABLES
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert keeping_variables() == {}
