"""Train the lists of an IVF index, the same bits for any number of threads.

On a GPU, where one is given, the products of k-means are computed there, which take most of the
time; their last bits then differ.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.index.exact_search import unit_rows
from s4g_ray.index.faiss_library import by_blocks, faiss
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.stores.gpu import GpuDevice
from s4g_ray.index.top_k import Found

SEED = 1234  # of k-means
SPLIT = 1 / 1024  # k-means divides a list in halves whose centroids differ by this share
ENCODER_SAMPLE = 100_000  # vectors that the ranges of ivf_sq8 are taken from, as faiss does


def train_lists(plan: IndexPlan, sample: Floats32, gpu: GpuDevice | None = None) -> bytes:
    """Train the empty IVF index of a plan on unit vectors sample[S, D], and serialise it.

    Raises ValueError for S < num_lists.
    """
    if len(sample) < plan.num_lists:
        raise ValueError(
            f"{len(sample)} vectors are too few to train {plan.num_lists} lists on;"
            f" give {plan.train_size}"
        )
    index = _make_index(plan)
    _train(index, sample, gpu)
    return bytes(faiss.serialize_index(index))


def _make_index(plan: IndexPlan) -> Any:
    code = "SQ8"
    if plan.kind == "ivf_rabitq":
        code = "RaBitQ" if plan.bits == 1 else f"RaBitQ{plan.bits}"
    # RaBitQ's error bounds hold for vectors turned at random (arXiv 2405.12497)
    rotation = "RR," if plan.bits else ""
    factory = f"{rotation}IVF{plan.num_lists},{code}"
    return faiss.index_factory(plan.dim, factory, faiss.METRIC_INNER_PRODUCT)


def nearest_lists(quantizer: Any, vectors: Floats32, count: int) -> Found:
    """Find in a flat index the largest products with vectors[n, D] -> rows, products[n, count].

    Gives the same bits for any number of threads.
    """
    found = by_blocks(lambda rows: quantizer.search(vectors[rows], count), len(vectors))
    if not found:
        return np.empty((0, count), np.int64), np.empty((0, count), np.float32)
    scores, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, scores


def assign(quantizer: Any, vectors: Floats32, gpu: GpuDevice | None, copy: Any = None) -> Ints:
    """Find the list of each of vectors[n, D] -> lists[n]; copy: the quantizer on the GPU."""
    if gpu is None:
        return nearest_lists(quantizer, vectors, 1)[0][:, 0].copy()
    return gpu.nearest(copy if copy is not None else gpu.upload(quantizer), vectors)


def without_rotation(index: Any) -> Any:
    """Return the IVF index itself, without RaBitQ's rotation before it."""
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.downcast_index(index.index)
    return index


def rotation_of(index: Any) -> Any:
    """Return RaBitQ's rotation; None for an index without."""
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.downcast_VectorTransform(index.chain.at(0))
    return None


def rotate(index: Any, vectors: Floats32) -> Floats32:
    """Turn vectors[n, D] as an index's lists hold them; same bits for any number of threads."""
    rotation = rotation_of(index)
    if rotation is None or not len(vectors):
        return np.ascontiguousarray(vectors)
    return np.concatenate(by_blocks(lambda rows: rotation.apply(vectors[rows]), len(vectors)))


def _train(index: Any, sample: Floats32, gpu: GpuDevice | None) -> None:
    """Train an IVF index in the steps of faiss's `train`; same bits for any number of threads."""
    lists = without_rotation(index)
    rotation = rotation_of(index)
    if rotation is not None:
        # QR on one thread: 0.08 s of processor time for D=1024; two threads took 0.5 to 4 s
        # (two cores that other processes shared)
        by_blocks(lambda rows: rotation.train(sample[rows]), 1)
    turned = rotate(index, sample)
    centroids = _cluster(turned, lists.nlist, lists.cp.niter, gpu)
    lists.quantizer.add(centroids)
    stride = math.ceil(len(turned) / ENCODER_SAMPLE)
    chosen = turned[::stride]
    nearest = assign(lists.quantizer, chosen, gpu)
    encoded = chosen - centroids[nearest] if lists.by_residual else np.ascontiguousarray(chosen)
    lists.train_encoder(len(encoded), faiss.swig_ptr(encoded), faiss.swig_ptr(nearest))
    lists.is_trained = True
    index.is_trained = True


def _cluster(
    sample: Floats32, num_lists: int, rounds: int, gpu: GpuDevice | None = None
) -> Floats32:
    """Run spherical k-means: unit vectors sample[S, D] -> centroids[num_lists, D] of length 1.

    Replaces faiss.Clustering, which divides its products among threads. Training by blocks took
    0.29 to 0.37 s of processor time, faiss 0.25 to 0.28 (8192 vectors of D=512, 128 lists, RaBitQ;
    Haswell's kernels, 1 and 2 threads).
    """
    rng = np.random.default_rng(SEED)
    centroids = sample[rng.permutation(len(sample))[:num_lists]]
    for _ in range(rounds):
        flat = faiss.IndexFlatIP(sample.shape[1])
        flat.add(centroids)
        nearest = assign(flat, sample, gpu)
        order = np.argsort(nearest, kind="stable")
        ends = np.searchsorted(nearest[order], np.arange(num_lists + 1))
        for row in np.flatnonzero(np.diff(ends)):
            centroids[row] = sample[order[ends[row] : ends[row + 1]]].sum(axis=0)
        centroids = unit_rows(centroids)
        _fill_empty(centroids, np.diff(ends))
    return centroids


def _fill_empty(centroids: Floats32, counts: Ints) -> None:
    """Give each empty list half of the largest list; changes centroids and counts in place."""
    shift = np.where(np.arange(centroids.shape[1]) % 2, -SPLIT, SPLIT).astype(np.float32)
    for row in np.flatnonzero(counts == 0):
        largest = counts.argmax()
        counts[row] = counts[largest] // 2
        counts[largest] -= counts[row]
        centroids[row] = centroids[largest] * (1 + shift)
        centroids[largest] *= 1 - shift
