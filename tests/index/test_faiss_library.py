from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from s4g_ray.index.faiss_library import (
    CORE,
    blas_core,
    by_blocks,
    faiss,
    installed_faiss,
    serial_pool,
    set_num_threads,
)

# prints the name of each result that is not the same for 1, 2 and 4 threads
COMPARE = """
import hashlib
import io
import numpy as np
from s4g_ray.index.exact_search import search, unit_rows
from s4g_ray.index.faiss_library import faiss, set_num_threads
from s4g_ray.index.vector_index import VectorIndex

def digest(*arrays):
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return hashlib.sha256(data).hexdigest()

def near_a_subspace(count, dim, seed):
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(9).normal(size=(20, dim))
    return rng.normal(size=(count, 20)) @ directions + rng.normal(size=(count, dim))

def compare(name, results):
    if len({digest(*result) for result in results}) != 1:
        print(name)

for count, dim in ((3000, 32), (1001, 100), (1001, 1000)):
    vectors, ids = near_a_subspace(count, dim, 0), np.arange(count)
    queries = near_a_subspace(301, dim, 1)
    for kind in ("ivf_sq8", "ivf_rabitq", "hnsw")[: 3 if dim == 32 else 2]:
        built, found = [], []
        for threads in (1, 2, 4):
            set_num_threads(threads)
            index = VectorIndex.build(vectors, ids, kind=kind, num_threads=threads)
            file = io.BytesIO()
            index.store.write(file)
            built.append([np.frombuffer(file.getvalue(), np.uint8)])
            index.effort = 4
            answers = [np.hstack(index.search(part, 9)) for part in (queries, queries[:5])]
            found.append(np.concatenate(answers))
        compare(f"{kind} {count}x{dim} built", built)
        compare(f"{kind} {count}x{dim} searched", [[answer] for answer in found])
    unit, asked = unit_rows(vectors), unit_rows(queries)
    for engine in ("faiss", "torch", "torch_bf16"):
        for part in (asked, asked[:33], asked[:5], asked[:1]):
            answers = []
            for threads in (1, 2, 4):
                answers.append(search(part, unit, ids, 9, engine=engine, num_threads=threads))
            compare(f"{engine} {len(part)}x{count}x{dim}", answers)
print("compared")
"""


def test_faiss_builds_are_exclusive() -> None:
    assert installed_faiss({"numpy", "faiss-cpu"}) == "faiss-cpu"
    with pytest.raises(ImportError, match=r"install s4g-ray\[cpu\] or s4g-ray\[gpu\]"):
        installed_faiss({"numpy"})
    with pytest.raises(ImportError, match="faiss-cpu and faiss-gpu are both installed"):
        installed_faiss({"faiss-cpu", "faiss-gpu"})


def test_fast_kernels_are_asked_for_where_the_processor_has_them_and_the_user_names_none() -> None:
    old = "model name\t: x\nflags\t\t: fpu avx2\n"
    new = "model name\t: x\nflags\t\t: fpu avx2 avx512f avx512bw\n"
    assert blas_core(new, {}) == "SkylakeX"
    assert blas_core(old, {}) is None
    assert blas_core("", {}) is None
    assert blas_core(new, {CORE: "Haswell"}) is None


def test_importing_faiss_leaves_the_environment_as_it_was() -> None:
    assert CORE not in os.environ


def test_threads_are_set_for_both_libraries_and_none_means_as_many_as_torch_has() -> None:
    before = torch.get_num_threads()
    try:
        assert set_num_threads(3) == 3
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (3, 3)
        assert set_num_threads(None) == 3
    finally:
        set_num_threads(before)


# None: the kernels that faiss_library asks for, SkylakeX where the processor has AVX-512
@pytest.mark.parametrize("core", [None, "Haswell"])
def test_indexes_and_searches_are_the_same_bits_for_any_number_of_threads(core: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != CORE}
    if core:
        environment[CORE] = core
    command = [sys.executable, "-c", COMPARE]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "compared\n"


def test_blocks_have_the_same_bounds_for_any_number_of_threads_and_come_in_order() -> None:
    def describe(rows: slice) -> tuple[int, int, int]:
        return rows.start, rows.stop, faiss.omp_get_max_threads()

    before = set_num_threads(None)
    found = []
    try:
        for threads in (1, 3):
            set_num_threads(threads)
            found.append(by_blocks(describe, 600))
            assert faiss.omp_get_max_threads() == threads
    finally:
        set_num_threads(before)
    assert found[0] == found[1] == [(0, 300, 1), (300, 600, 1)]
    assert by_blocks(lambda rows: rows.stop, 0) == []
    assert by_blocks(lambda rows: rows.stop, 1) == [1]


def test_a_serial_pool_leaves_the_threads_of_all_others_as_they_were() -> None:
    before = set_num_threads(None)
    rows = torch.randn(19, 4096)
    queries = torch.randn(19, 4096)
    try:
        set_num_threads(3)
        with serial_pool(2) as pool:
            alone = [pool.submit(torch.mm, queries, rows.T).result() for _ in range(2)]
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (3, 3)
        set_num_threads(1)
        np.testing.assert_array_equal(alone[0], torch.mm(queries, rows.T))
        np.testing.assert_array_equal(alone[0], alone[1])
    finally:
        set_num_threads(before)
