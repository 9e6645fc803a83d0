"""Copy a store to a GPU and search it there, within the limits of faiss's kernels.

The vectors stay in the processor's memory too: what a GPU cannot answer is searched there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats32, Ints
from s4g_ray.errors import RunError
from s4g_ray.index.faiss_library import faiss
from s4g_ray.index.plan import GPU_MAX_K, GPU_MAX_NPROBE
from s4g_ray.index.top_k import Found

BLOCK = 16_384  # vectors that are copied at once
# for a search, of each GpuDevice; faiss by itself takes three times as much. A shard opens one to
# build and one a version, because threads must not share one
SCRATCH_BYTES = 512 * 2**20
# rows of a part, of those that its k allows: rows are dealt to the parts, never quite evenly
FILL = 2 / 3


class GpuDevice:
    """A GPU that faiss can use, and the limits of its kernels."""

    def __init__(
        self, device: int, resources: Any, max_k: int = GPU_MAX_K, max_nprobe: int = GPU_MAX_NPROBE
    ) -> None:
        self._device = device
        self._resources = resources
        self.max_k = max_k
        self.max_nprobe = max_nprobe

    @classmethod
    def open(cls, device: int = 0) -> Self:
        """Return a GPU. Raises RunError when this faiss has no GPU support, or there is none."""
        if not hasattr(faiss, "StandardGpuResources"):
            raise RunError(
                "this faiss has no GPU support; install s4g-ray[gpu], or set"
                " mining.gpus_per_shard=0"
            )
        if device >= faiss.get_num_gpus():
            raise RunError(
                f"GPU {device} does not exist: faiss finds {faiss.get_num_gpus()};"
                " set mining.gpus_per_shard=0"
            )
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(SCRATCH_BYTES)
        return cls(device, resources)

    def upload(self, index: Any) -> Any:
        """Copy a faiss index to the GPU."""
        return faiss.index_cpu_to_gpu(self._resources, self._device, index)

    def make_flat(self, vectors: NDArray[Any]) -> Any:
        """Make an exact index of vectors[N, D] on the GPU; float16 stays float16 there."""
        config = faiss.GpuIndexFlatConfig()
        config.device = self._device
        config.useFloat16 = vectors.dtype == np.float16
        index = faiss.GpuIndexFlatIP(self._resources, vectors.shape[1], config)
        add_blocks(index, vectors)
        return index

    def nearest(self, quantizer: Any, vectors: Floats32) -> Ints:
        """Find the row of a flat index on the GPU that is nearest to each of vectors[n, D]."""
        rows: Ints = quantizer.search(np.ascontiguousarray(vectors), 1)[1][:, 0]
        return np.ascontiguousarray(rows)


@dataclass(frozen=True)
class GpuPart:
    """A part of a store on a GPU: result r of its index is row r * stride + first of the store."""

    index: Any
    stride: int = 1
    first: int = 0


class GpuCopy:
    """A copy of a store on a GPU, in as many parts as the k of a search needs.

    make_parts(n) makes the parts of a copy in n parts, to which rows are dealt in turn. A part
    finds at most max_k results, and so a search of a larger k merges the answers of several.
    """

    def __init__(self, gpu: GpuDevice, make_parts: Callable[[int], list[GpuPart]]) -> None:
        self.gpu = gpu
        self._make_parts = make_parts
        self._parts: list[GpuPart] = []
        self._lock = threading.Lock()

    def search(self, queries: Floats32, k: int, parameters: Any) -> tuple[Ints, Floats32, Bools]:
        """Search queries[M, D] -> rows[M, k], scores[M, k], doubtful[M].

        Doubtful: a part filled all its results with some of the k best, so that it may hold more
        of them.
        """
        num_parts = count_parts(k, self.gpu.max_k)
        with self._lock:
            if len(self._parts) < num_parts:
                self._parts = []  # frees the GPU's memory first
                self._parts = self._make_parts(num_parts)
            return search_parts(self._parts, queries, k, self.gpu.max_k, parameters)

    def discard(self) -> None:
        """Forget the copy, because the store has changed; the next search copies it again."""
        with self._lock:
            self._parts = []


def count_parts(k: int, max_k: int) -> int:
    """Return the number of parts that together find k results, each at most max_k."""
    return 1 if k <= max_k else int(np.ceil(k / (FILL * max_k)))


def search_parts(
    parts: Sequence[GpuPart], queries: Floats32, k: int, max_k: int, parameters: Any
) -> tuple[Ints, Floats32, Bools]:
    """Search as GpuCopy.search does; the parts hold disjoint rows."""
    all_rows = []
    all_scores = []
    for part in parts:
        count = min(k, max_k, part.index.ntotal)
        scores, found = part.index.search(queries, count, params=parameters)
        all_rows.append(np.where(found >= 0, found * part.stride + part.first, -1))
        all_scores.append(np.where(found >= 0, scores, -np.inf).astype(np.float32))
    rows, scores = _merge(all_rows, all_scores, k)
    doubtful = np.zeros(len(queries), bool)
    for part, part_scores in zip(parts, all_scores, strict=True):
        last = part_scores[:, -1]
        is_cut = part_scores.shape[1] < min(k, part.index.ntotal)
        doubtful |= is_cut & np.isfinite(last) & (last >= scores[:, -1])
    return rows, scores, doubtful


def add_blocks(index: Any, vectors: NDArray[Any]) -> None:
    """Add vectors[N, D] to a faiss index, a block in float32 at a time."""
    for start in range(0, len(vectors), BLOCK):
        index.add(np.ascontiguousarray(vectors[start : start + BLOCK], dtype=np.float32))


def _merge(all_rows: list[Ints], all_scores: list[Floats32], k: int) -> Found:
    """Merge the answers of parts into rows[M, k], scores[M, k], padded with -1 and -inf."""
    rows = np.concatenate(all_rows, axis=1)
    scores = np.concatenate(all_scores, axis=1)
    missing = k - rows.shape[1]
    if missing > 0:
        rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
