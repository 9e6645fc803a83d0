"""Let processes that compute on CPUs keep the memory that they free.

On a CPU torch takes the result of each layer from malloc and frees it soon. The malloc of glibc
returns large blocks to the kernel at once, which then clears every page of the next block: at
inputs of 128 pixels, that is half of the processor time of an encoder (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import os

# of glibc's malloc: all threads share one heap, which holds large blocks too and never shrinks
VARIABLES = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),  # bytes free at its end
}
# the same as parameters of mallopt(3), as malloc.h numbers them
PARAMETERS = {-8: 1, -4: 0, -1: 2**31 - 1}


def keeping_variables() -> dict[str, str]:
    """Return the environment variables of a process that keeps what it frees.

    None where this process's environment has one of them: its user has chosen.
    """
    return {} if _is_chosen() else dict(VARIABLES)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where its malloc is that of glibc.

    To be called before other threads start: they may have heaps of their own. Does nothing where
    the environment has one of VARIABLES.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or _is_chosen():
        return
    for parameter, value in PARAMETERS.items():
        mallopt(parameter, value)


def _is_chosen() -> bool:
    return not VARIABLES.keys().isdisjoint(os.environ)
