"""Train, fill and search FAISS's approximate indexes: IVF lists and HNSW graphs.

Vectors have length 1 and are addressed by row number; the metric is the inner product. `effort` is
the search effort: nprobe lists or ef_search candidates.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.errors import RunError
from s4g_ray.index.exact_search import unit_rows
from s4g_ray.index.faiss_library import by_blocks, faiss, set_faiss_threads
from s4g_ray.index.plan import GPU_MAX_K, GPU_MAX_NPROBE, IVF_KINDS, IndexPlan
from s4g_ray.index.top_k import Found

SEED = 1234  # of k-means
EF_CONSTRUCTION = 80
SPLIT = 1 / 1024  # k-means divides a list in halves whose centroids differ by this share
ENCODER_SAMPLE = 100_000  # vectors that the ranges of ivf_sq8 are taken from, as faiss does


def train(plan: IndexPlan, sample: Floats32) -> bytes:
    """Train the empty index of a plan on unit vectors sample[S, D], and serialise it.

    HNSW needs no training: an empty graph. Raises ValueError for S < num_lists.
    """
    index = _make_index(plan)
    if plan.kind in IVF_KINDS:
        if len(sample) < plan.num_lists:
            raise ValueError(
                f"{len(sample)} vectors are too few to train {plan.num_lists} lists on;"
                f" give {plan.train_size}"
            )
        _train_lists(index, sample)
    return bytes(faiss.serialize_index(index))


class ApproximateStore:
    """Codes in lists of which a query visits some (IVF), or vectors in a graph (HNSW)."""

    def __init__(self, index: Any, effort: int) -> None:
        self._index = index
        self.effort = effort
        self._resources: Any = None  # of a GPU

    @classmethod
    def from_bytes(cls, data: Any, plan: IndexPlan) -> Self:
        """Read an index that `train` or `to_bytes` serialised."""
        index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
        return cls(index, plan.nprobe if plan.kind in IVF_KINDS else plan.ef_search)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def to_bytes(self) -> NDArray[np.uint8]:
        """Serialise the index, for a file."""
        index = faiss.index_gpu_to_cpu(self._index) if self._resources else self._index
        return np.asarray(faiss.serialize_index(index))

    def add(self, vectors: Floats32) -> None:
        """Append vectors[n, D]; the index is the same for any number of threads.

        FAISS (1.15.1) itself links graphs and fills lists that way; products are computed by
        blocks here.
        """
        lists = self._lists()
        if self._resources or isinstance(lists, faiss.IndexHNSW):
            self._index.add(vectors)
            return
        turned = _rotate(self._index, vectors)
        nearest = nearest_lists(lists.quantizer, turned, 1)[0][:, 0].copy()
        lists.add_core(len(turned), faiss.swig_ptr(turned), None, faiss.swig_ptr(nearest))
        self._index.ntotal = lists.ntotal

    def search(self, queries: Floats32, k: int, num_threads: int | None) -> Found:
        """Search queries[M, D] -> rows[M, k], scores[M, k]; k within 1..len.

        Raises the effort for queries with fewer than k results until each has k.
        """
        set_faiss_threads(num_threads)
        effort = self.effort
        rows, scores = self._search(queries, k, effort)
        short = np.flatnonzero((rows < 0).any(axis=1))
        while len(short):
            if effort >= self._max_effort():
                rows[short], scores[short] = self._search_all(queries[short], k)
                break
            effort = min(4 * effort, self._max_effort())
            rows[short], scores[short] = self._search(queries[short], k, effort)
            short = short[(rows[short] < 0).any(axis=1)]
        return rows, scores

    def to_gpu(self, device: int) -> None:
        """Move the index to a GPU. Raises RunError for kinds that faiss cannot search on one."""
        if not isinstance(self._lists(), faiss.IndexIVFScalarQuantizer):
            raise RunError(
                "faiss searches flat, sqfp16 and ivf_sq8 on a GPU; set mining.index_kind to one of"
                " them"
            )
        self._resources = gpu_resources(device)
        self._index = faiss.index_cpu_to_gpu(self._resources, device, self._index)

    def _search(self, queries: Floats32, k: int, effort: int) -> Found:
        """Search at one effort -> rows[M, k], scores[M, k]; row -1 where fewer than k are found."""
        parameters = self._parameters(effort)
        lists = self._lists()
        if self._resources:
            check_gpu_limits(k, effort)
        if self._resources or isinstance(lists, faiss.IndexHNSW):
            scores, rows = self._index.search(queries, k, params=parameters)
            return rows, scores
        turned = _rotate(self._index, queries)
        nearest, products = nearest_lists(lists.quantizer, turned, min(effort, lists.nlist))
        rows = np.empty((len(turned), k), np.int64)
        scores = np.empty((len(turned), k), np.float32)
        lists.search_preassigned_c(  # the C form: the Python wrapper takes no parameters
            len(turned),
            faiss.swig_ptr(turned),
            k,
            faiss.swig_ptr(nearest),
            faiss.swig_ptr(products),
            faiss.swig_ptr(scores),
            faiss.swig_ptr(rows),
            False,
            parameters,
        )
        return rows, scores

    def _search_all(self, queries: Floats32, k: int) -> Found:
        """Search all vectors of a graph one by one, because the graph does not lead to k of them.

        All lists of an IVF index together hold k vectors, but a GPU visits only some of them.
        Raises RunError then.
        """
        storage = getattr(self._index, "storage", None)
        if storage is None:
            raise RunError(
                f"fewer than {k=} of {len(self)} vectors lie in {self._max_effort()} lists, the"
                " most that a query visits; set mining.gpus_per_shard=0"
            )
        return nearest_lists(faiss.downcast_index(storage), queries, k)

    def _lists(self) -> Any:
        """Return the IVF or HNSW index itself, without RaBitQ's rotation before it."""
        return _without_rotation(self._index)

    def _max_effort(self) -> int:
        lists = self._lists()
        max_effort = int(lists.nlist) if hasattr(lists, "nlist") else len(self)
        return min(max_effort, GPU_MAX_NPROBE) if self._resources else max_effort

    def _parameters(self, effort: int) -> Any:
        lists = self._lists()
        if isinstance(lists, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=effort)
        if not isinstance(lists, faiss.IndexIVFRaBitQ):
            return faiss.SearchParametersIVF(nprobe=effort)
        parameters = faiss.IVFRaBitQSearchParameters()
        parameters.nprobe = effort
        parameters.qb = lists.qb
        return parameters


def _make_index(plan: IndexPlan) -> Any:
    metric = faiss.METRIC_INNER_PRODUCT
    if plan.kind == "hnsw":
        graph = faiss.IndexHNSWFlat(plan.dim, plan.links, metric)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        return graph
    code = "SQ8"
    if plan.kind == "ivf_rabitq":
        code = "RaBitQ" if plan.bits == 1 else f"RaBitQ{plan.bits}"
    # RaBitQ's error bounds hold for vectors turned at random (arXiv 2405.12497)
    rotation = "RR," if plan.bits else ""
    return faiss.index_factory(plan.dim, f"{rotation}IVF{plan.num_lists},{code}", metric)


def nearest_lists(quantizer: Any, vectors: Floats32, count: int) -> Found:
    """Find in a flat index the largest products with vectors[n, D] -> rows, products[n, count].

    Gives the same bits for any number of threads.
    """
    found = by_blocks(lambda rows: quantizer.search(vectors[rows], count), len(vectors))
    if not found:
        return np.empty((0, count), np.int64), np.empty((0, count), np.float32)
    scores, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, scores


def _without_rotation(index: Any) -> Any:
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.downcast_index(index.index)
    return index


def _rotation_of(index: Any) -> Any:
    """Return RaBitQ's rotation; None for an index without."""
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.downcast_VectorTransform(index.chain.at(0))
    return None


def _rotate(index: Any, vectors: Floats32) -> Floats32:
    """Turn vectors[n, D] as an index's lists hold them; same bits for any number of threads."""
    rotation = _rotation_of(index)
    if rotation is None or not len(vectors):
        return np.ascontiguousarray(vectors)
    return np.concatenate(by_blocks(lambda rows: rotation.apply(vectors[rows]), len(vectors)))


def _train_lists(index: Any, sample: Floats32) -> None:
    """Train an IVF index in the steps of faiss's `train`; same bits for any number of threads."""
    lists = _without_rotation(index)
    rotation = _rotation_of(index)
    if rotation is not None:
        # QR on one thread: 0.08 s of processor time for D=1024; two threads took 0.5 to 4 s
        # (two cores that other processes shared)
        by_blocks(lambda rows: rotation.train(sample[rows]), 1)
    turned = _rotate(index, sample)
    centroids = _cluster(turned, lists.nlist, lists.cp.niter)
    lists.quantizer.add(centroids)
    stride = math.ceil(len(turned) / ENCODER_SAMPLE)
    chosen = turned[::stride]
    nearest = nearest_lists(lists.quantizer, chosen, 1)[0][:, 0].copy()
    encoded = chosen - centroids[nearest] if lists.by_residual else np.ascontiguousarray(chosen)
    lists.train_encoder(len(encoded), faiss.swig_ptr(encoded), faiss.swig_ptr(nearest))
    lists.is_trained = True
    index.is_trained = True


def _cluster(sample: Floats32, num_lists: int, rounds: int) -> Floats32:
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
        nearest = nearest_lists(flat, sample, 1)[0][:, 0]
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


def gpu_resources(device: int) -> Any:
    """Return the resources that faiss needs to use a GPU.

    Raises RunError when this faiss has no GPU support, or there is no such device.
    """
    if not hasattr(faiss, "StandardGpuResources"):
        raise RunError(
            "this faiss has no GPU support; install s4g-ray[gpu], or set mining.gpus_per_shard=0"
        )
    if device >= faiss.get_num_gpus():
        raise RunError(
            f"GPU {device} does not exist: faiss finds {faiss.get_num_gpus()};"
            " set mining.gpus_per_shard=0"
        )
    return faiss.StandardGpuResources()


def check_gpu_limits(k: int, nprobe: int = 1) -> None:
    """Raise RunError for k or nprobe above the limits of faiss's GPU kernels."""
    if k > GPU_MAX_K or nprobe > GPU_MAX_NPROBE:
        raise RunError(
            f"faiss on a GPU searches with k <= {GPU_MAX_K} and nprobe <= {GPU_MAX_NPROBE}, not"
            f" {k=} and {nprobe=}; lower mining.max_candidates or mining.nprobe, or set"
            " mining.gpus_per_shard=0"
        )
