"""FAISS: VectorIndex (no Ray), the IndexShard actor, and the IndexService client.

The metric is the inner product of L2-normalised vectors; VectorIndex alone normalises and names it.
"""

from __future__ import annotations

import importlib.metadata
import threading
from typing import Any, Literal, Self

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from s4g_ray import storage
from s4g_ray.config import MiningConfig
from s4g_ray.embedding import read_embeddings
from s4g_ray.errors import RunError


def installed_faiss(distributions: set[str]) -> str:
    """The one FAISS build among installed distributions. Raises ImportError for none or several."""
    builds = sorted(distributions & {"faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"})
    if not builds:
        raise ImportError("FAISS is not installed; install s4g-ray[cpu] or s4g-ray[gpu]")
    if len(builds) > 1:
        raise ImportError(
            f"{' and '.join(builds)} are both installed and overwrite each other: pip uninstall both,"
            " then install either s4g-ray[cpu] or s4g-ray[gpu]"
        )
    return builds[0]


installed_faiss({(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()})
import faiss  # noqa: E402

Kind = Literal["auto", "flat", "sqfp16"]
VERSIONS_KEPT = 2
BYTES_PER_VALUE = {"flat": 4, "sqfp16": 2}


def choose_kind(num_vectors: int, dim: int, memory_gb: float | None) -> Literal["flat", "sqfp16"]:
    """The most exact kind that fits: float32 vectors, else float16. Raises ValueError when neither does."""
    needed = {kind: num_vectors * dim * width / 1e9 for kind, width in BYTES_PER_VALUE.items()}
    for kind in ("flat", "sqfp16"):
        if memory_gb is None or needed[kind] <= memory_gb:
            return kind
    raise ValueError(
        f"{num_vectors} vectors of D={dim} need {needed['sqfp16']:.2f} GB as float16, over {memory_gb=};"
        " raise mining.index_memory_gb"
    )


class VectorIndex:
    """Nearest vectors by cosine, with our own ids."""

    def __init__(self, index: Any, kind: str) -> None:
        self._index, self.kind = index, kind

    @classmethod
    def build(
        cls,
        vectors: NDArray[Any],
        ids: NDArray[np.int64],
        *,
        kind: Kind = "auto",
        memory_gb: float | None = None,
    ) -> Self:
        """vectors[N, D], ids[N] unique and not negative. `auto` is exact (flat), or float16 where memory_gb asks.

        Raises ValueError for shapes, ids and non-finite vectors that cannot be indexed.
        """
        if vectors.ndim != 2 or len(vectors) != len(ids) or not len(ids):
            raise ValueError(f"vectors{list(vectors.shape)} and ids{list(ids.shape)} are not [N, D] and [N], N >= 1")
        if len(np.unique(ids)) != len(ids) or ids.min() < 0:
            raise ValueError("ids must be unique and not negative")
        dim = vectors.shape[1]
        chosen = choose_kind(len(ids), dim, memory_gb) if kind == "auto" else kind
        inner: Any
        if chosen == "flat":
            inner = faiss.IndexFlatIP(dim)
        else:
            inner = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index = faiss.IndexIDMap(inner)
        index.add_with_ids(_unit_rows(vectors), ids.astype(np.int64))
        return cls(index, chosen)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """D of the vectors."""
        return int(self._index.d)

    def search(self, queries: NDArray[Any], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """queries[M, D] -> ids[M, k], scores[M, k] (cosine), best first.

        Raises ValueError when k exceeds the collection, D differs, or a query is not finite.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"k={k} is not within 1..{len(self)}, the size of the index")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries{list(queries.shape)} do not fit an index of D={self.dim}")
        scores, ids = self._index.search(_unit_rows(queries), k)
        if (ids < 0).any():
            raise RunError(f"the index returned fewer than k={k} vectors")
        return ids, scores

    def save(self, uri: str) -> None:
        """Publish the index as one file and a manifest."""
        data = faiss.serialize_index(self._index).tobytes()
        part = storage.write_part(uri, "index.faiss", data, len(self))
        storage.publish(uri, "index", [part], info={"kind": self.kind})

    @classmethod
    def load(cls, uri: str) -> Self:
        """Read a published index. Raises RunError when it is missing, cut short or altered."""
        manifest = storage.open_published(uri, "index")
        data = storage.read_part(uri, manifest.parts[0])
        return cls(faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8)), manifest.info["kind"])


def _unit_rows(vectors: NDArray[Any]) -> NDArray[np.float32]:
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise ValueError(f"{int((~np.isfinite(norms)).sum())} vectors are not finite")
    return np.asarray(rows / np.maximum(norms, np.finfo(np.float32).tiny), dtype=np.float32)


class IndexShard:
    """An actor that holds the newest versions of an index and answers searches."""

    def __init__(self, num_threads: int) -> None:
        faiss.omp_set_num_threads(num_threads)
        self._versions: dict[int, VectorIndex] = {}
        self._swap = threading.Lock()

    def build(self, version: int, embeddings: str, ids: NDArray[np.int64], kind: Kind, memory_gb: float | None) -> int:
        """Index the rows `ids` of an embedding table beside the current version, then swap; returns the size."""
        table = read_embeddings(embeddings, "references")
        chosen = np.isin(table.ids, ids)
        index = VectorIndex.build(table.vectors[chosen], table.ids[chosen], kind=kind, memory_gb=memory_gb)
        with self._swap:
            newest = sorted([*self._versions, version])[-VERSIONS_KEPT:]
            self._versions = {v: index if v == version else self._versions[v] for v in newest}
        return len(index)

    def search(
        self, version: int, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """As VectorIndex.search, on one version. Raises KeyError for a version that is not held."""
        return self._versions[version].search(queries, k)


class IndexService:
    """The client of the index actor, started with it; a context manager that stops it."""

    def __init__(self, cfg: MiningConfig) -> None:
        self._cfg = cfg
        actor = ray.remote(IndexShard).options(num_cpus=0, max_concurrency=2)
        self._shard: Any = actor.remote(cfg.index_threads)

    def build(self, version: int, embeddings: str, ids: NDArray[np.int64]) -> int:
        """Index the references `ids` of an embedding table under a version; returns how many there were.

        Raises RunError for what the actor refuses, and when it has died.
        """
        cfg = self._cfg
        call = self._shard.build.remote(version, embeddings, ray.put(ids), cfg.index_kind, cfg.index_memory_gb)
        return int(_answer(call))

    def search(
        self, version: int, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """queries[M, D] -> ids[M, k], scores[M, k], best first, from one version. Raises RunError as build does."""
        ids, scores = _answer(self._shard.search.remote(version, ray.put(queries), k))
        return ids, scores

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        ray.kill(self._shard)


def _answer(call: Any) -> Any:
    try:
        return ray.get(call)
    except RayError as error:
        raise RunError(f"the index failed: {str(error).strip().splitlines()[-1]}") from error
