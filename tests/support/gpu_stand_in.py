"""A GPU for tests on machines without one: the same limits, on copies of indexes in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.index.faiss_library import faiss
from s4g_ray.index.stores.gpu import GpuDevice, add_blocks


class _Limited:
    """An index that refuses searches beyond the limits of faiss's GPU kernels."""

    def __init__(self, index: Any, gpu: GpuStandIn) -> None:
        self._index = index
        self._gpu = gpu
        self.ntotal = index.ntotal

    def search(self, queries: Any, k: int, params: Any = None) -> Any:
        assert k <= self._gpu.max_k
        assert params is None or params.nprobe <= self._gpu.max_nprobe
        assert getattr(params, "sel", None) is None
        self._gpu.num_searches += 1
        return self._index.search(queries, k, params=params)


class GpuStandIn(GpuDevice):
    """Counts copies and searches."""

    def __init__(self, max_k: int = 2048, max_nprobe: int = 2048) -> None:
        super().__init__(0, None, max_k, max_nprobe)
        self.num_uploads = 0
        self.num_searches = 0

    def upload(self, index: Any) -> Any:
        self.num_uploads += 1
        return _Limited(faiss.clone_index(index), self)

    def make_flat(self, vectors: NDArray[Any]) -> Any:
        self.num_uploads += 1
        index = faiss.IndexFlatIP(vectors.shape[1])
        add_blocks(index, np.asarray(vectors))
        return _Limited(index, self)
