"""Import exactly one FAISS build, with the fast kernels of its BLAS, and set its threads.

All modules that use FAISS import it from here: `from s4g_ray.index.faiss_library import faiss`.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

CORE = "OPENBLAS_CORETYPE"
# least number of rows in a block whose products one thread computes: with 128, faiss.knn took
# five times as long a row (Haswell's kernels, D=512, 16,384 references)
PRODUCT_ROWS = 256


def installed_faiss(distributions: set[str]) -> str:
    """Return the FAISS build among installed distributions.

    Raises ImportError for none or several.
    """
    builds = sorted(distributions & {"faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"})
    if not builds:
        raise ImportError("FAISS is not installed; install s4g-ray[cpu] or s4g-ray[gpu]")
    if len(builds) > 1:
        raise ImportError(
            f"{' and '.join(builds)} are both installed and overwrite each other: pip uninstall"
            " both, then install either s4g-ray[cpu] or s4g-ray[gpu]"
        )
    return builds[0]


def blas_core(cpuinfo: str, environment: Mapping[str, str]) -> str | None:
    """Return the OpenBLAS kernels to ask for: those for AVX-512 on processors that have it.

    Returns None on others, and where the environment names kernels. By itself, the BLAS within
    faiss takes AVX2 kernels or older on processors that it does not know: 60 against 250 GFLOP/s
    (2 threads of a Xeon with AVX-512).
    """
    if CORE in environment:
        return None
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return "SkylakeX" if "avx512f" in flags.split() else None


def _read_cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


installed_faiss({(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()})
_core = blas_core(_read_cpuinfo(), os.environ)
if _core:
    os.environ[CORE] = _core  # OpenBLAS reads it once, while it is loaded
faiss: Any = importlib.import_module("faiss")  # Any: its type hints lack much of its interface

if _core:
    del os.environ[CORE]  # child processes choose for themselves


def set_num_threads(num_threads: int | None) -> int:
    """Set the threads of faiss and torch, process-wide and permanently, and return their number.

    None: torch's present number for both. Ray starts workers with OMP_NUM_THREADS=1, so a caller
    that wants more must pass a number.
    """
    import torch  # not at the top: it takes seconds, and approximate indexes do not need it

    chosen = torch.get_num_threads() if num_threads is None else num_threads
    if torch.get_num_threads() != chosen:
        torch.set_num_threads(chosen)
    faiss.omp_set_num_threads(chosen)
    return chosen


def set_faiss_threads(num_threads: int | None) -> None:
    """Set the threads of faiss alone, process-wide and permanently; None: as many as torch has."""
    if num_threads is None:
        set_num_threads(None)
    else:
        faiss.omp_set_num_threads(num_threads)


def serial_pool(num_threads: int) -> ThreadPoolExecutor:
    """Start threads that compute each product alone, without the threads of a BLAS.

    A BLAS divides a product among its threads, and the last bits depend on where it divides it.
    FAISS's OpenBLAS: differences up to 3e-7 in a product of unit vectors, 2e-6 in a rotation
    matrix (Haswell's kernels; SkylakeX's in fewer shapes). torch's MKL: in products of few rows
    (5 x 2048, 19 x 19).
    """
    return ThreadPoolExecutor(num_threads, initializer=_compute_alone)


def row_blocks(count: int) -> list[slice]:
    """Divide `count` rows evenly into blocks of at least PRODUCT_ROWS, or one block of fewer.

    The bounds depend on `count` alone: products by blocks are the same for any number of threads.
    """
    num_blocks = max(count // PRODUCT_ROWS, min(count, 1))
    return [
        slice(count * i // num_blocks, count * (i + 1) // num_blocks) for i in range(num_blocks)
    ]


def by_blocks(function: Callable[[slice], Result], count: int) -> list[Result]:
    """Return function(rows) of each of row_blocks(count), in order, each computed by one thread.

    As many threads as FAISS has take blocks; a function that releases the GIL uses all of them.
    """
    blocks = row_blocks(count)
    num_threads = faiss.omp_get_max_threads()
    if len(blocks) > 1:
        with serial_pool(min(num_threads, len(blocks))) as pool:
            return list(pool.map(function, blocks))
    faiss.omp_set_num_threads(1)  # of this thread alone; starting a pool takes 0.5 ms
    try:
        return [function(block) for block in blocks]
    finally:
        faiss.omp_set_num_threads(num_threads)


def _compute_alone() -> None:
    """Make the calling thread compute on its own; all other threads stay as they are."""
    if "torch" in sys.modules:  # approximate indexes do not need torch, whose import takes seconds
        _compute_alone_in_torch()
    faiss.omp_set_num_threads(1)  # last: torch sets it up in the thread


def _compute_alone_in_torch() -> None:
    """Make torch's products of the calling thread use one thread.

    torch.set_num_threads does not help: it is process-wide.
    """
    import torch

    # sets up the thread; otherwise its first product would, and undo the setting below
    torch.get_num_threads()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    set_mkl_threads = getattr(library, "MKL_Set_Num_Threads_Local", None)
    if set_mkl_threads is not None:  # torch has no MKL on ARM
        set_mkl_threads(1)
