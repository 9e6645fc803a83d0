from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest

from s4g_ray.arrays import by_rows, space_rows


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("num_threads", [1, 2, 3, None])
def test_every_row_goes_to_one_thread_and_results_are_in_order(
    count: int, num_threads: int | None
) -> None:
    ranges = by_rows(lambda first, last: list(range(first, last)), count, num_threads)
    assert [row for rows in ranges for row in rows] == list(range(count))
    assert len(ranges) <= max(count, 1)


def test_ranges_run_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=60)
    assert sorted(by_rows(lambda first, last: together.wait(), 3, 3)) == [0, 1, 2]


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        by_rows(lambda first, last: 1 // (first - 1), 2, 2)


def test_kernels_run_in_several_threads_at_once_and_in_a_forked_process() -> None:
    """Numba's own parallel loops fail at this."""
    script = """
import multiprocessing, os
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from s4g_ray.evaluation.ranking import normalise
from s4g_ray.sampling.geographic_neighbors import geographic_neighbors
rng = np.random.default_rng(0)
lat, lon = rng.uniform(0, 1, (2, 500))
vectors = rng.normal(size=(500, 8)).astype(np.float32)
def work(_):
    return geographic_neighbors(lat, lon, 5)[0].sum() + normalise(vectors, np.arange(500), "").sum()
wanted = work(0)
with ThreadPoolExecutor(4) as pool:
    assert set(pool.map(work, range(20))) == {wanted}
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert set(pool.map(work, range(4))) == {wanted}
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout == "done\n"


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 64, 65, 1000])
@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_spaced_rows_are_ascending_and_reach_both_ends(num_rows: int, size: int) -> None:
    rows = space_rows(num_rows, size).tolist()
    assert len(rows) == min(num_rows, size)
    assert rows == sorted(set(rows))
    if num_rows and size > 1:
        assert (rows[0], rows[-1]) == (0, num_rows - 1)
        gaps = {after - before for before, after in itertools.pairwise(rows)}
        assert not gaps or max(gaps) - min(gaps) <= 1
