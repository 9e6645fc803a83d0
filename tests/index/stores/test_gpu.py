"""Copies on a GPU. Without one, a stand-in has its limits and answers in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from s4g_ray.errors import RunError
from s4g_ray.index.faiss_library import faiss
from s4g_ray.index.plan import Kind, plan_index
from s4g_ray.index.stores.gpu import count_parts
from s4g_ray.index.vector_index import VectorIndex
from tests.support.gpu_stand_in import GpuStandIn
from tests.support.search_oracle import clustered, data, recall

ON_GPU: tuple[Kind, ...] = ("flat", "sqfp16", "ivf_sq8")


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss has GPU support")
@pytest.mark.parametrize("kind", ON_GPU)
def test_a_gpu_without_faiss_gpu_is_refused(kind: Kind) -> None:
    vectors, ids, _ = data()
    with pytest.raises(
        RunError, match=r"no GPU support; install s4g-ray\[gpu\], or set mining\.gpus_per_shard=0"
    ):
        VectorIndex.build(vectors, ids, kind=kind).to_gpu()


@pytest.mark.parametrize("kind", ["ivf_rabitq", "hnsw"])
def test_kinds_without_a_gpu_form_are_refused(kind: Kind) -> None:
    vectors, ids, _ = data()
    with pytest.raises(RunError, match=f"flat, sqfp16, ivf_sq8 on a GPU, not {kind}"):
        VectorIndex.build(vectors, ids, kind=kind).to_gpu()


def assert_same(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-3)
    assert np.mean(found[0] == wanted[0]) > 0.97


@pytest.mark.parametrize("kind", ON_GPU)
@pytest.mark.parametrize("k", [1, 64, 65, 200, 1000])
def test_any_k_is_found_on_a_gpu_in_as_many_parts_as_it_needs(kind: Kind, k: int) -> None:
    vectors = clustered(2000)
    queries = clustered(20, seed=1)
    index = VectorIndex.build(vectors, np.random.default_rng(0).permutation(2000), kind=kind)
    if kind == "ivf_sq8":
        index.effort = 30
    wanted = index.search(queries, k)
    gpu = GpuStandIn(max_k=64)
    index.to_gpu(gpu)
    assert_same(index.search(queries, k), wanted)
    assert gpu.num_uploads >= -(-k // 64)
    copied = gpu.num_uploads
    index.search(queries, 1)
    assert gpu.num_uploads == copied


def test_parts_whose_results_are_all_among_the_best_are_searched_again_in_memory() -> None:
    """Rows 0, 4, 8 ... are the nearest: all in one of the four parts that k = 40 needs."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 16))
    vectors[::4] = rng.normal(size=16) + 0.1 * rng.normal(size=(100, 16))
    index = VectorIndex.build(vectors, np.arange(400), kind="flat")
    queries = vectors[:5] + 0.01
    wanted = index.search(queries, 40)
    gpu = GpuStandIn(max_k=16)
    assert count_parts(40, 16) == 4
    index.to_gpu(gpu)
    np.testing.assert_array_equal(index.search(queries, 40)[0], wanted[0])


@pytest.mark.parametrize("kind", ON_GPU)
def test_changes_reach_the_gpu_and_restricted_searches_stay_in_memory(kind: Kind) -> None:
    vectors = clustered(1000)
    queries = clustered(10, seed=1)
    index = VectorIndex.build(vectors, np.arange(1000), kind=kind)
    gpu = GpuStandIn()
    index.to_gpu(gpu)
    first = index.search(queries, 1)[0][:, 0]
    index.add(queries, np.arange(2000, 2010))
    assert index.search(queries, 1)[0][:, 0].tolist() == list(range(2000, 2010))
    index.remove(np.arange(2000, 2010))
    np.testing.assert_array_equal(index.search(queries, 1)[0][:, 0], first)
    searched = gpu.num_searches
    ids, _ = index.search(queries, 3, ids=np.arange(50))
    assert ids.max() < 50
    assert gpu.num_searches == searched


def test_an_effort_above_the_limit_of_a_gpu_is_lowered_and_all_k_are_found() -> None:
    index = VectorIndex.build(clustered(3000), np.arange(3000), kind="ivf_sq8")
    queries = clustered(10, seed=1)
    gpu = GpuStandIn(max_nprobe=2)
    index.to_gpu(gpu)
    index.effort = 1000
    assert index.effort == 2
    padded, _ = index.search_padded(queries, 1500)
    assert (padded < 0).any()
    found, _ = index.search(queries, 1500)
    assert all(len(set(row)) == 1500 for row in found.tolist())
    assert found.min() >= 0


@pytest.mark.parametrize("kind", ["ivf_sq8", "ivf_rabitq"])
def test_lists_are_trained_and_filled_on_a_gpu_as_in_memory(kind: Kind) -> None:
    vectors = clustered(3000)
    queries = clustered(20, seed=1)
    plan = plan_index(3000, 32, kind=kind)
    answers = []
    for gpu in (None, GpuStandIn()):
        template = VectorIndex.template(plan, vectors, gpu=gpu)
        index = VectorIndex.empty(plan, template, gpu=gpu)
        for start in range(0, 3000, 1000):
            index.add(vectors[start : start + 1000], np.arange(start, start + 1000))
        answers.append(index.search(queries, 10))
        if gpu is not None:
            # a copy of the centroids for each round of k-means, the ranges, and all adding
            assert gpu.num_uploads == 12
    assert recall(answers[0][0], answers[1][0].tolist()) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "error"), [("flat", 1e-5), ("sqfp16", 2e-3), ("ivf_sq8", 2e-3)])
def test_a_gpu_answers_as_the_processor_does(kind: Kind, error: float) -> None:
    vectors = clustered(5000)
    queries = clustered(50, seed=1)
    ids = np.random.default_rng(0).permutation(5000)
    index = VectorIndex.build(vectors, ids, kind=kind)
    in_memory = VectorIndex.build(vectors, ids, kind=kind)
    index.to_gpu()
    for k in (100, 2049, 4000):
        wanted, wanted_scores = in_memory.search(queries, k)
        found, scores = index.search(queries, k)
        np.testing.assert_allclose(scores, wanted_scores, atol=error)
        assert recall(found, wanted.tolist()) > 0.98
