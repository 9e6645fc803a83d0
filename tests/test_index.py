from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from s4g_ray.errors import RunError
from s4g_ray.index import VectorIndex, choose_kind, installed_faiss

Array = NDArray[Any]


def brute_force(vectors: Array, ids: Array, queries: Array, k: int) -> tuple[list[list[int]], Array]:
    found, scores = [], []
    for q in queries.astype(np.float64):
        cosine = [(float(q @ v / np.linalg.norm(q) / np.linalg.norm(v)), i) for v, i in zip(vectors, ids, strict=True)]
        best = sorted(cosine, key=lambda pair: -pair[0])[:k]
        found.append([int(i) for _, i in best])
        scores.append([s for s, _ in best])
    return found, np.array(scores)


def data() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(200, 24)).astype(np.float32) * 7,
        rng.permutation(10_000)[:200],
        rng.normal(size=(30, 24)),
    )


@pytest.mark.parametrize("kind", ["auto", "flat"])
@pytest.mark.parametrize("k", [1, 9, 200])
def test_search_equals_brute_force(kind: str, k: int) -> None:
    vectors, ids, queries = data()
    found, scores = VectorIndex.build(vectors, ids, kind=kind).search(queries, k)  # type: ignore[arg-type]
    wanted, wanted_scores = brute_force(vectors, ids, queries, k)
    assert found.tolist() == wanted
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)


def test_float16_codes_score_nearly_the_same() -> None:
    vectors, ids, queries = data()
    index = VectorIndex.build(vectors, ids, kind="sqfp16")
    found, scores = index.search(queries, 10)
    wanted, wanted_scores = brute_force(vectors, ids, queries, 10)
    np.testing.assert_allclose(scores, wanted_scores, atol=2e-3)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), wanted, strict=True)]) > 0.97


def test_saving_and_loading_keeps_the_answers_and_refuses_altered_files(tmp_path: Path) -> None:
    vectors, ids, queries = data()
    index = VectorIndex.build(vectors, ids)
    index.save(str(tmp_path / "i"))
    again = VectorIndex.load(str(tmp_path / "i"))
    assert (again.kind, len(again), again.dim) == ("flat", 200, 24)
    for before, after in zip(index.search(queries, 5), again.search(queries, 5), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    path = tmp_path / "i/index.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"index\.faiss is not what was published"):
        VectorIndex.load(str(tmp_path / "i"))


def test_what_cannot_be_indexed_or_searched_is_refused() -> None:
    vectors, ids, queries = data()
    index = VectorIndex.build(vectors, ids)
    with pytest.raises(ValueError, match=r"k=201 is not within 1\.\.200"):
        index.search(queries, 201)
    with pytest.raises(ValueError, match="do not fit an index of D=24"):
        index.search(queries[:, :5], 1)
    with pytest.raises(ValueError, match="1 vectors are not finite"):
        index.search(np.array([[np.nan] * 24]), 1)
    for bad in (np.zeros(200, dtype=np.int64), ids - 10_000, ids[:5]):
        with pytest.raises(ValueError, match="ids"):
            VectorIndex.build(vectors, bad)
    vectors[3, 3] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        VectorIndex.build(vectors, ids)


def test_the_kind_is_chosen_by_memory() -> None:
    assert choose_kind(10**6, 1024, None) == "flat"
    assert choose_kind(10**6, 1024, 4.2) == "flat"
    assert choose_kind(10**6, 1024, 2.1) == "sqfp16"
    with pytest.raises(ValueError, match=r"2\.05 GB as float16, over memory_gb=1"):
        choose_kind(10**6, 1024, 1)


def test_faiss_builds_are_exclusive() -> None:
    assert installed_faiss({"numpy", "faiss-cpu"}) == "faiss-cpu"
    with pytest.raises(ImportError, match=r"install s4g-ray\[cpu\] or s4g-ray\[gpu\]"):
        installed_faiss({"numpy"})
    with pytest.raises(ImportError, match="faiss-cpu and faiss-gpu are both installed"):
        installed_faiss({"faiss-cpu", "faiss-gpu"})
