"""FAISS's approximate indexes (IVF and HNSW) as VectorIndex holds them: unit vectors by row number, inner product."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.errors import RunError
from s4g_ray.index.faiss_library import faiss, set_faiss_threads
from s4g_ray.index.plan import GPU_MAX_K, GPU_MAX_NPROBE, IVF_KINDS, IndexPlan

Found = tuple[Ints, Floats32]

SEED = 1234  # of k-means and of RaBitQ's rotation
EF_CONSTRUCTION = 80


def train(plan: IndexPlan, sample: Floats32) -> bytes:
    """The trained, empty IVF index of a plan, serialised; sample[S, D] unit vectors, S >= num_lists.

    Raises ValueError for a sample that is too small. HNSW needs no training: an empty graph.
    """
    index = _make(plan)
    if plan.kind in IVF_KINDS:
        if len(sample) < plan.num_lists:
            raise ValueError(
                f"{len(sample)} vectors are too few to train {plan.num_lists} lists on; give {plan.train_size}"
            )
        index.train(sample)
    return bytes(faiss.serialize_index(index))


class ApproximateStore:
    """Codes in lists that a query visits some of (IVF), or vectors in a graph that it walks (HNSW)."""

    def __init__(self, index: Any, effort: int) -> None:
        self._index, self.effort = index, effort
        self._resources: Any = None  # of a GPU

    @classmethod
    def from_bytes(cls, data: Any, plan: IndexPlan) -> Self:
        """An index as `train` and `to_bytes` make it."""
        index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
        return cls(index, plan.nprobe if plan.kind in IVF_KINDS else plan.ef_search)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def to_bytes(self) -> NDArray[np.uint8]:
        """All of it, for a file."""
        index = faiss.index_gpu_to_cpu(self._index) if self._resources else self._index
        return np.asarray(faiss.serialize_index(index))

    def add(self, vectors: Floats32) -> None:
        """Append vectors[n, D]; faiss links a graph alike with any number of threads (1.15.1)."""
        self._index.add(vectors)

    def search(self, queries: Floats32, k: int, num_threads: int | None) -> Found:
        """queries[M, D] -> rows[M, k], scores[M, k]; k within 1..len. Searches on until every query has k."""
        set_faiss_threads(num_threads)
        rows, scores = self._search(queries, k, self.effort)
        short, effort = np.flatnonzero((rows < 0).any(axis=1)), self.effort
        while len(short):
            if effort >= self._most_effort():
                rows[short], scores[short] = self._search_all(queries[short], k)
                break
            effort = min(4 * effort, self._most_effort())
            rows[short], scores[short] = self._search(queries[short], k, effort)
            short = short[(rows[short] < 0).any(axis=1)]
        return rows, scores

    def to_gpu(self, device: int) -> None:
        """Move to a GPU. Raises RunError for kinds that faiss has no GPU form of."""
        if not isinstance(self._lists(), faiss.IndexIVFScalarQuantizer):
            raise RunError(
                "faiss searches flat, sqfp16 and ivf_sq8 on a GPU; set mining.index_kind to one of them"
            )
        self._resources = gpu_resources(device)
        self._index = faiss.index_cpu_to_gpu(self._resources, device, self._index)

    def _search(self, queries: Floats32, k: int, effort: int) -> Found:
        if self._resources:
            check_gpu_limits(k, effort)
        scores, rows = self._index.search(queries, k, params=self._parameters(effort))
        return rows, scores

    def _search_all(self, queries: Floats32, k: int) -> Found:
        """For a graph that does not lead everywhere: its vectors one by one. All lists give k; a GPU visits some."""
        storage = getattr(self._index, "storage", None)
        if storage is None:
            raise RunError(
                f"fewer than {k=} of {len(self)} vectors lie in {self._most_effort()} lists, the most that a query"
                " visits; set mining.gpus_per_shard=0"
            )
        scores, rows = faiss.downcast_index(storage).search(queries, k)
        return rows, scores

    def _lists(self) -> Any:
        """The index behind RaBitQ's rotation."""
        index = self._index
        return (
            faiss.downcast_index(index.index)
            if isinstance(index, faiss.IndexPreTransform)
            else index
        )

    def _most_effort(self) -> int:
        lists = self._lists()
        most = int(lists.nlist) if hasattr(lists, "nlist") else len(self)
        return min(most, GPU_MAX_NPROBE) if self._resources else most

    def _parameters(self, effort: int) -> Any:
        lists = self._lists()
        if isinstance(lists, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=effort)
        if not isinstance(lists, faiss.IndexIVFRaBitQ):
            return faiss.SearchParametersIVF(nprobe=effort)
        inner = faiss.IVFRaBitQSearchParameters()
        inner.nprobe, inner.qb = effort, lists.qb
        return faiss.SearchParametersPreTransform(index_params=inner)


def _make(plan: IndexPlan) -> Any:
    metric = faiss.METRIC_INNER_PRODUCT
    if plan.kind == "hnsw":
        graph = faiss.IndexHNSWFlat(plan.dim, plan.links, metric)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        return graph
    code = "SQ8" if plan.kind == "ivf_sq8" else f"RaBitQ{plan.bits if plan.bits > 1 else ''}"
    # RaBitQ's error bounds hold for vectors turned at random (arXiv 2405.12497)
    index = faiss.index_factory(
        plan.dim, f"{'RR,' if plan.bits else ''}IVF{plan.num_lists},{code}", metric
    )
    lists = faiss.extract_index_ivf(index)
    lists.cp.seed = SEED
    lists.cp.min_points_per_centroid = 1  # or faiss warns on standard error
    return index


def gpu_resources(device: int) -> Any:
    """What faiss needs to use a GPU. Raises RunError when it is built without, or the device is not there."""
    if not hasattr(faiss, "StandardGpuResources"):
        raise RunError(
            "this faiss has no GPU support; install s4g-ray[gpu], or set mining.gpus_per_shard=0"
        )
    if device >= faiss.get_num_gpus():
        raise RunError(
            f"GPU {device} is not there: faiss sees {faiss.get_num_gpus()}; set mining.gpus_per_shard=0"
        )
    return faiss.StandardGpuResources()


def check_gpu_limits(k: int, nprobe: int = 1) -> None:
    """Raises RunError for more than faiss's GPU kernels can do."""
    if k > GPU_MAX_K or nprobe > GPU_MAX_NPROBE:
        raise RunError(
            f"faiss on a GPU searches with k <= {GPU_MAX_K} and nprobe <= {GPU_MAX_NPROBE}, not {k=} and {nprobe=};"
            " lower mining.max_candidates or mining.nprobe, or set mining.gpus_per_shard=0"
        )
