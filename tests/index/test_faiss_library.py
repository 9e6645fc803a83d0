from __future__ import annotations

import os

import pytest
import torch

from s4g_ray.index.faiss_library import CORE, blas_core, faiss, installed_faiss, set_num_threads


def test_faiss_builds_are_exclusive() -> None:
    assert installed_faiss({"numpy", "faiss-cpu"}) == "faiss-cpu"
    with pytest.raises(ImportError, match=r"install s4g-ray\[cpu\] or s4g-ray\[gpu\]"):
        installed_faiss({"numpy"})
    with pytest.raises(ImportError, match="faiss-cpu and faiss-gpu are both installed"):
        installed_faiss({"faiss-cpu", "faiss-gpu"})


def test_fast_kernels_are_asked_for_where_the_processor_has_them_and_the_user_names_none() -> None:
    old, new = (
        "model name\t: x\nflags\t\t: fpu avx2\n",
        "model name\t: x\nflags\t\t: fpu avx2 avx512f avx512bw\n",
    )
    assert blas_core(new, {}) == "SkylakeX"
    assert blas_core(old, {}) is None
    assert blas_core("", {}) is None
    assert blas_core(new, {CORE: "Haswell"}) is None


def test_importing_faiss_leaves_the_environment_as_it_was() -> None:
    assert CORE not in os.environ


def test_threads_are_set_for_both_libraries_and_none_means_torchs() -> None:
    before = torch.get_num_threads()
    try:
        assert set_num_threads(3) == 3
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (3, 3)
        assert set_num_threads(None) == 3
    finally:
        set_num_threads(before)
