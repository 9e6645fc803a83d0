"""FAISS, imported on purpose: exactly one of its builds, on the fast path of the BLAS that it brings along.

Everything that needs FAISS takes it from here: `from s4g_ray.faiss_library import faiss`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CORE = "OPENBLAS_CORETYPE"


def installed_faiss(distributions: set[str]) -> str:
    """The one FAISS build among installed distributions. Raises ImportError for none or several."""
    builds = sorted(distributions & {"faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"})
    if not builds:
        raise ImportError("FAISS is not installed; install s4g-ray[cpu] or s4g-ray[gpu]")
    if len(builds) > 1:
        raise ImportError(
            f"{' and '.join(builds)} are both installed and overwrite each other: pip uninstall both,"
            " then install either s4g-ray[cpu] or s4g-ray[gpu]"
        )
    return builds[0]


def blas_core(cpuinfo: str, environment: Mapping[str, str]) -> str | None:
    """The OpenBLAS kernels to ask for: those for AVX-512 where the processor has it and the user names none.

    Left alone, the BLAS within faiss takes AVX2 kernels or older on processors that it does not know: 60 against
    250 GFLOP/s (2 threads of a Xeon with AVX-512).
    """
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split()
    return "SkylakeX" if "avx512f" in flags and CORE not in environment else None


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


installed_faiss({(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()})
_core = blas_core(_cpuinfo(), os.environ)
if _core:
    os.environ[CORE] = _core  # OpenBLAS reads it once, while it is loaded
faiss: Any = importlib.import_module("faiss")  # Any: its type hints leave out much of what it wraps

if _core:
    del os.environ[CORE]  # child processes choose for themselves


def set_num_threads(num_threads: int | None) -> int:
    """Set the threads of faiss and torch, process-wide and to stay; None leaves torch's number for both.

    Ray starts workers with OMP_NUM_THREADS=1, so a number that is meant has to be said. Returns it.
    """
    import torch  # not at the top: it takes seconds, and approximate indexes do without

    chosen = torch.get_num_threads() if num_threads is None else num_threads
    if torch.get_num_threads() != chosen:
        torch.set_num_threads(chosen)
    faiss.omp_set_num_threads(chosen)
    return chosen


def set_faiss_threads(num_threads: int | None) -> None:
    """Set the threads of faiss alone, process-wide and to stay; None: as many as torch has."""
    if num_threads is None:
        set_num_threads(None)
    else:
        faiss.omp_set_num_threads(num_threads)
