"""A start that hangs in native code ends, by its limit and by Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from s4g_ray.distributed.start_limit import TooLateError, limited

# a lock of the C library that is taken twice: no signal ends the wait for it
HANG = """
import ctypes, signal, sys
from contextlib import suppress
from s4g_ray.distributed import start_limit
start_limit.GRACE_S = 0.2
signal.signal(signal.SIGINT, lambda *_: None)  # or it might end the loop before it hangs
lock = ctypes.create_string_buffer(64)
library = ctypes.CDLL(None)
with start_limit.limited(float(sys.argv[1]), "Ray did not start"):
    print("on", flush=True)
    while True:
        with suppress(BaseException):  # a signal before it hangs
            library.pthread_mutex_lock(lock)
            library.pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize(
    ("limit_s", "code", "told"),
    [("1", 1, "s4g: Ray did not start\n"), ("1000", 130, "s4g: interrupted\n")],
)
def test_a_start_that_hangs_in_native_code_ends(limit_s: str, code: int, told: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANG, limit_s],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "on\n"
        if code == 130:
            os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == code
        assert process.stderr.read() == told


def test_a_start_within_its_limit_leaves_nothing_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with limited(60, "late"):
        pass
    with pytest.raises(TooLateError), limited(0.05, "late"):
        time.sleep(60)
    with pytest.raises(KeyboardInterrupt), limited(60, "late"):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_alarm_of_a_caller_stays() -> None:
    rung: list[int] = []

    def ring(number: int, _: object) -> None:
        rung.append(number)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100.0, 7.0)
        with limited(60, "late"):
            pass
        left_s, again_s = signal.getitimer(signal.ITIMER_REAL)
        assert 90 < left_s <= 100
        assert again_s == 7
        signal.alarm(0)
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
