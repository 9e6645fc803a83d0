from __future__ import annotations

import multiprocessing
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from s4g_ray.index import exact_search
from s4g_ray.index.exact_search import (
    Engine,
    choose_engine,
    exact_top_k,
    measure_engines,
    search,
    unit_rows,
)

Array = NDArray[Any]
ENGINES: tuple[Engine, ...] = ("faiss", "torch", "torch_bf16")


def oracle(queries: Array, references: Array, k: int) -> tuple[Array, Array]:
    """Return all scores in float64, and rows[M, k] ordered by score, then row."""
    scores = np.array(
        [[float(q @ r) for r in references.astype(np.float64)] for q in queries.astype(np.float64)]
    )
    return scores, np.array(
        [sorted(range(len(references)), key=lambda j: (-row[j], j))[:k] for row in scores]
    )


def assert_exact(found: tuple[Array, Array], queries: Array, references: Array, k: int) -> None:
    """Check scores against float64, rows where scores differ by more than 1e-6, no row twice."""
    every, wanted = oracle(queries, references, k)
    rows, scores = found
    assert rows.shape == scores.shape == (len(queries), k)
    best = np.take_along_axis(every, wanted, 1)
    np.testing.assert_allclose(scores, best, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(every, rows, 1), best, atol=1e-6)
    assert all(len(set(row)) == k for row in rows.tolist())
    clear = (
        np.abs(best[:, :, None] - every[:, None, :]) <= 1e-6
    )  # [query, rank, reference]: may be at that rank
    alone = clear.sum(axis=2) == 1
    np.testing.assert_array_equal(rows[alone], wanted[alone])


def vectors(count: int, dim: int, seed: int = 0) -> Array:
    return unit_rows(np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_search, "QUERY_BLOCK", 7)
    monkeypatch.setattr(exact_search, "REFERENCE_BLOCK", 16)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("num_queries", "num_references", "k"),
    [
        (1, 1, 1),
        (1, 50, 3),
        (7, 16, 16),
        (8, 17, 5),
        (20, 100, 100),
        (14, 32, 1),
        (15, 300, 20),
        (3, 10, 2),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_every_engine_equals_the_oracle(
    engine: Engine, num_queries: int, num_references: int, k: int
) -> None:
    queries = vectors(num_queries, 24)
    references = vectors(num_references, 24, seed=1)
    assert_exact(
        exact_top_k(queries, references, k, engine=engine, num_threads=2), queries, references, k
    )


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 400), st.integers(1, 40)),
    spread=st.sampled_from([1.0, 1e-2, 1e-4]),
    share=st.floats(0, 1),
)
def test_references_that_are_nearly_the_same_are_distinguished(
    engine: Engine, seed: int, sizes: tuple[int, int, int], spread: float, share: float
) -> None:
    rng = np.random.default_rng(seed)
    num_queries, num_references, dim = sizes
    centre = rng.standard_normal(dim)
    references = unit_rows(centre + spread * rng.standard_normal((num_references, dim)))
    queries = unit_rows(centre + spread * rng.standard_normal((num_queries, dim)))
    k = 1 + int(share * (num_references - 1))
    assert_exact(
        exact_top_k(queries, references, k, engine=engine, num_threads=2), queries, references, k
    )


def test_bfloat16_candidates_alone_would_be_wrong_where_the_engine_is_right() -> None:
    rng = np.random.default_rng(0)
    references = unit_rows(rng.standard_normal(64) + 0.05 * rng.standard_normal((2000, 64)))
    queries = references[:40] * np.float32(1)
    k = 10
    half = torch.from_numpy(queries).bfloat16(), torch.from_numpy(references).bfloat16()
    rough = np.argsort(-torch.mm(half[0], half[1].T).float().numpy(), axis=1, kind="stable")[:, :k]
    rows, scores = exact_top_k(queries, references, k, engine="torch_bf16")
    assert np.mean(rough == rows) < 0.5
    assert_exact((rows, scores), queries, references, k)


def test_bfloat16_candidates_reach_as_far_as_rounding_does() -> None:
    queries = vectors(400, 48)
    references = vectors(4000, 48, seed=1)
    k = 10
    wanted = np.argsort(-queries.astype(np.float64) @ references.astype(np.float64).T, axis=1)[
        :, :k
    ]
    rows, _ = exact_top_k(queries, references, k, engine="torch_bf16")
    np.testing.assert_array_equal(rows, wanted)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("small_blocks")
def test_duplicates_are_ordered_by_id_wherever_they_are(engine: Engine) -> None:
    rng = np.random.default_rng(3)
    distinct = vectors(6, 12)
    references = distinct[rng.integers(0, 6, 200)]
    ids = rng.permutation(1000)[:200]
    queries = vectors(20, 12, seed=5)
    rows, scores = search(queries, references, ids, 90, engine=engine)
    every = np.round(queries.astype(np.float64) @ references.astype(np.float64).T, 9)
    wanted = [sorted(range(200), key=lambda j: (-row[j], ids[j]))[:90] for row in every]
    assert rows.tolist() == wanted
    np.testing.assert_allclose(scores, np.take_along_axis(every, np.array(wanted), 1), atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_identical_references_come_in_the_order_of_their_ids(engine: Engine) -> None:
    references = np.repeat(vectors(1, 32), 5003, axis=0)
    rows, _ = search(
        vectors(3, 32, seed=1), references, np.arange(5003)[::-1].copy(), 70, engine=engine
    )
    assert (rows == np.arange(5002, 4932, -1)).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("small_blocks")
def test_float16_references_are_searched_exactly(engine: Engine) -> None:
    references = vectors(120, 24).astype(np.float16)
    queries = vectors(9, 24, seed=1)
    found = exact_top_k(queries, references, 13, engine=engine)
    assert_exact(found, queries, references.astype(np.float32), 13)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_number_of_threads_changes_nothing_and_read_only_arrays_are_accepted(
    engine: Engine,
) -> None:
    references = vectors(500, 16)
    queries = vectors(33, 16, seed=1)
    references.flags.writeable = queries.flags.writeable = False
    one, three = (exact_top_k(queries, references, 9, engine=engine, num_threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one[0], three[0])
    np.testing.assert_allclose(one[1], three[1], atol=1e-6)


def test_arguments_that_do_not_fit_are_refused() -> None:
    unit = vectors(10, 8)
    for k in (0, 11):
        with pytest.raises(ValueError, match=rf"k={k} is not within 1\.\.10"):
            exact_top_k(unit, unit, k)
    with pytest.raises(ValueError, match=r"queries\[10, 7\] do not fit references\[10, 8\]"):
        exact_top_k(unit_rows(unit[:, :7]), unit, 1)
    with pytest.raises(
        ValueError, match=r"row 4 of references is not of length 1; normalise with unit_rows"
    ):
        exact_top_k(unit, np.concatenate([unit[:4], 2 * unit[4:]]), 1)
    with pytest.raises(ValueError, match="row 0 of queries"):
        exact_top_k(unit * np.float32(np.nan), unit, 1)
    with pytest.raises(ValueError, match=r"\[8\] are not \[N, D\]"):
        exact_top_k(unit[0], unit, 1)


def test_rows_become_unit_length_whatever_their_type_and_scale() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 5))
    for scaled in (
        rows * 1e-30,
        rows * 1e30,
        rows.astype(np.float16),
        (rows * 1e25).astype(np.float32),
    ):
        wide = scaled.astype(np.float64)
        np.testing.assert_allclose(
            unit_rows(scaled), wide / np.linalg.norm(wide, axis=1, keepdims=True), atol=1e-6
        )
    assert unit_rows(np.zeros((1, 3))).tolist() == [[0, 0, 0]]
    rows[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 vectors are not finite; the first is row 2"):
        unit_rows(rows)
    with pytest.raises(ValueError, match="not finite"):
        unit_rows(np.full((1, 2), 1e39))


def test_the_fastest_engine_is_chosen_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(dim: int, num_threads: int) -> dict[str, float]:
        measured.append((dim, num_threads))
        return {"torch": 2.0, "faiss": 3.0, "torch_bf16": 1.0}

    monkeypatch.setattr(exact_search, "measure_engines", measure)
    choose_engine.cache_clear()
    assert [choose_engine(48, 2), choose_engine(48, 2)] == ["torch_bf16", "torch_bf16"]
    assert measured == [(48, 2)]
    choose_engine.cache_clear()


def test_the_calibration_is_short_and_measures_every_engine() -> None:
    measure_engines(32, 1, budget_s=0.01)  # compiles
    started = time.process_time()
    seconds = measure_engines(32, 1, budget_s=0.3)
    assert time.process_time() - started < 1
    assert set(seconds) == set(ENGINES)
    assert all(0 < s < 1e-6 for s in seconds.values())


def peak_of_a_search(engine: Engine) -> float:
    """Return the GB that a search of 6,000 x 24,000 needs beyond its arguments.

    All scores would take 0.58 GB.
    """
    queries = vectors(6_000, 64)
    references = vectors(24_000, 64, seed=1)
    exact_top_k(queries[:50], references, 10, engine=engine, num_threads=2)  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exact_top_k(queries, references, 10, engine=engine, num_threads=2)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_search_needs_the_memory_of_blocks_not_of_all_scores(engine: Engine) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(peak_of_a_search, (engine,)) < 0.2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("small_blocks")
def test_searches_may_run_at_the_same_time(engine: Engine) -> None:
    queries = vectors(40, 16)
    references = vectors(300, 16, seed=1)
    alone, _ = exact_top_k(queries, references, 9, engine=engine, num_threads=2)
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(exact_top_k, queries, references, 9, engine=engine, num_threads=2)
            for _ in range(12)
        ]
        for call in calls:
            np.testing.assert_array_equal(call.result()[0], alone)
