"""Find the nearest vectors by cosine, with the caller's ids; imports no Ray.

The metric is the inner product of L2-normalised vectors; only VectorIndex normalises and names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.errors import RunError, first_line
from s4g_ray.index.approximate_search import (
    ApproximateStore,
    check_gpu_limits,
    gpu_resources,
    train,
)
from s4g_ray.index.exact_search import Engine, search, unit_rows
from s4g_ray.index.faiss_library import faiss
from s4g_ray.index.plan import IVF_KINDS, IndexPlan, Kind, plan_index
from s4g_ray.index.top_k import Found
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_published, publish, read_part, write_part

ADD_BLOCK = 16_384  # vectors that are normalised at once
DENSE_TYPES: dict[str, type] = {"flat": np.float32, "sqfp16": np.float16}
INDEX_FILE = "index.bin"


class VectorIndex:
    """Vectors and their ids: `build` makes an index in one call, `empty` and `add` step by step.

    engine: the engine that searches exact kinds (exact_search). num_threads: threads of a search,
    set process-wide; None: as many as torch has.
    """

    def __init__(
        self,
        plan: IndexPlan,
        store: DenseStore | ApproximateStore,
        ids: Ints,
        engine: Engine,
        num_threads: int | None,
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.num_threads = num_threads
        self.store = store
        self._ids = ids
        self._sealed = False

    @classmethod
    def build(
        cls,
        vectors: NDArray[Any],
        ids: Ints,
        *,
        kind: Kind = "auto",
        memory_gb: float | None = None,
        engine: Engine = "auto",
        num_threads: int | None = None,
    ) -> Self:
        """Index vectors[N, D] under ids[N], unique and not negative.

        kind auto: the most exact kind that fits memory_gb. Raises ValueError for shapes, types or
        ids that cannot be indexed, for non-finite vectors, and for a budget that is too small.
        """
        if vectors.ndim != 2 or not len(vectors):
            raise ValueError(f"vectors{list(vectors.shape)} are not [N, D], N >= 1")
        plan = plan_index(len(vectors), vectors.shape[1], kind=kind, memory_gb=memory_gb)
        rows = np.random.default_rng(0).choice(len(vectors), plan.train_size, replace=False)
        template = cls.template(plan, vectors[np.sort(rows)])
        index = cls.empty(plan, template, engine=engine, num_threads=num_threads)
        index.add(vectors, ids)
        index.seal()
        return index

    @staticmethod
    def template(plan: IndexPlan, sample: NDArray[Any]) -> bytes:
        """Train on sample[S, D] the empty index that all shards copy, so that their scores compare.

        S = plan.train_size is best; exact kinds and hnsw need no sample. Raises ValueError for a
        sample that does not fit.
        """
        if plan.is_exact:
            return b""
        _check_vectors(sample, plan.dim)
        return train(plan, unit_rows(sample))

    @classmethod
    def empty(
        cls,
        plan: IndexPlan,
        template: bytes | None = None,
        *,
        engine: Engine = "auto",
        num_threads: int | None = None,
    ) -> Self:
        """Make an index without vectors, from a plan and the template that its shards share.

        Raises ValueError when the plan's kind is trained and no template is given.
        """
        store: DenseStore | ApproximateStore
        if plan.is_exact:
            store = DenseStore(np.empty((0, plan.dim), DENSE_TYPES[plan.kind]))
        else:
            if not template and plan.kind in IVF_KINDS:
                raise ValueError(
                    f"an index of kind {plan.kind} needs the template that its shards share"
                )
            untrained = np.empty((0, plan.dim), np.float32)
            store = ApproximateStore.from_bytes(template or train(plan, untrained), plan)
        return cls(plan, store, np.empty(0, np.int64), engine, num_threads)

    def add(self, vectors: NDArray[Any], ids: Ints) -> None:
        """Append vectors[n, D] of float16, float32 or float64, and ids[n]; copies both.

        Raises ValueError, before anything is added, for shapes and types that do not fit, for ids
        that are negative or repeated in the call, and for vectors that are not finite. `seal`
        finds ids that repeat over calls.
        """
        _check_vectors(vectors, self.dim)
        _check_ids(ids, len(vectors))
        for start in range(0, len(vectors), ADD_BLOCK):
            _check_finite(vectors[start : start + ADD_BLOCK], start)
        for start in range(0, len(vectors), ADD_BLOCK):
            self.store.add(unit_rows(vectors[start : start + ADD_BLOCK]))
        self._ids = _append(self._ids, ids)
        self._sealed = False

    def seal(self) -> None:
        """Check that no id was added twice; `search` and `save` call it. Raises ValueError."""
        if self._sealed:
            return
        ordered = np.sort(self._ids)
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if len(repeated):
            raise ValueError(
                f"{len(repeated)} ids were added more than once, {repeated[0]} among them;"
                " ids are unique"
            )
        self._sealed = True

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def dim(self) -> int:
        """D of the vectors."""
        return self.plan.dim

    @property
    def kind(self) -> str:
        """The plan's kind: flat, sqfp16, ivf_sq8, ivf_rabitq or hnsw."""
        return self.plan.kind

    @property
    def effort(self) -> int | None:
        """Search effort: nprobe (IVF) or ef_search (HNSW); None for exact kinds.

        A higher effort makes a search slower and its recall higher.
        """
        return self.store.effort

    @effort.setter
    def effort(self, effort: int) -> None:
        if self.store.effort is None:
            raise ValueError(f"effort={effort}: {self.kind} takes none")
        if effort < 1:
            raise ValueError(f"effort={effort}: {self.kind} takes 1 or more")
        self.store.effort = effort

    @property
    def info(self) -> dict[str, Any]:
        """Entries for the manifest of the folder that holds the index, the same for all shards."""
        return {
            "kind": self.kind,
            "dim": self.dim,
            "effort": self.effort,
            "plan": dataclasses.asdict(self.plan),
            "faiss": faiss.__version__,
        }

    def search(self, queries: NDArray[Any], k: int) -> Found:
        """Search queries[M, D] -> ids[M, k], scores[M, k] (cosine), best first, ties by lower id.

        Raises ValueError when k exceeds the number of vectors, D or the type does not fit, or a
        query is not finite.
        """
        self.seal()
        if not 1 <= k <= len(self):
            raise ValueError(f"k={k} is not within 1..{len(self)}, the size of the index")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries{list(queries.shape)} do not fit an index of D={self.dim}")
        _check_vectors(queries, self.dim)
        unit = unit_rows(queries)
        if isinstance(self.store, DenseStore):
            rows, scores = self.store.search(unit, k, self._ids, self.engine, self.num_threads)
        else:
            rows, scores = self.store.search(unit, k, self.num_threads)
        return order_ties(self._ids[rows], scores)

    def to_gpu(self, device: int = 0) -> None:
        """Move the index to a GPU, which then answers searches.

        Raises RunError for a missing GPU, and for kinds that faiss cannot search on one.
        """
        self.store.to_gpu(device)

    def save_part(self, folder: str, name: str) -> Part:
        """Write ids and vectors as one file of a folder, which is to be published with `info`."""
        self.seal()
        data = b"".join([self._ids.data, self.store.to_bytes().data])
        return write_part(folder, name, data, len(self))

    @classmethod
    def load_part(
        cls,
        folder: str,
        part: Part,
        info: Mapping[str, Any],
        *,
        engine: Engine = "auto",
        num_threads: int | None = None,
    ) -> Self:
        """Read a file of a published folder.

        Raises RunError when it is missing, cut short or altered.
        """
        plan = IndexPlan(**info["plan"])
        data = read_part(folder, part)
        try:
            # a copy: a view would keep the whole file in memory
            ids = np.frombuffer(data, np.int64, part.rows).copy()
            index = cls(plan, _read_store(data, part.rows, plan), ids, engine, num_threads)
            if index.effort is not None:
                index.effort = info["effort"]
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"{files.join(folder, part.name)} holds no {plan.kind} index of {part.rows} vectors"
                f" ({first_line(error)}); remove {folder} and resume"
            ) from error
        return index

    def save(self, uri: str) -> None:
        """Publish the index as a folder of its own."""
        part = self.save_part(uri, INDEX_FILE)
        publish(uri, "index", [part], info=self.info)

    @classmethod
    def load(cls, uri: str, *, engine: Engine = "auto", num_threads: int | None = None) -> Self:
        """Read a published index.

        Raises RunError when it is missing, cut short or altered.
        """
        manifest = open_published(uri, "index")
        return cls.load_part(
            uri, manifest.parts[0], manifest.info, engine=engine, num_threads=num_threads
        )


class DenseStore:
    """All vectors, float32 or float16, row by row, for exact search."""

    effort: None = None

    def __init__(self, vectors: NDArray[Any]) -> None:
        self._vectors = vectors
        self._gpu: Any = None

    def __len__(self) -> int:
        return len(self._vectors)

    def to_bytes(self) -> NDArray[Any]:
        """Return the vectors, for a file."""
        return self._vectors

    def add(self, vectors: Floats32) -> None:
        """Append vectors[n, D]."""
        self._vectors = _append(self._vectors, vectors)
        if self._gpu is not None:
            self._gpu.add(vectors)

    def search(
        self,
        queries: Floats32,
        k: int,
        ids: Ints,
        engine: Engine,
        num_threads: int | None,
    ) -> Found:
        """Search queries[M, D] -> rows[M, k], scores[M, k]; equal scores by lower id."""
        if self._gpu is None:
            return search(queries, self._vectors, ids, k, engine=engine, num_threads=num_threads)
        check_gpu_limits(k)
        scores, rows = self._gpu.search(queries, k)
        return rows, scores

    def to_gpu(self, device: int) -> None:
        """Copy the vectors to a GPU; float16 stays float16 there."""
        resources = gpu_resources(device)
        config = faiss.GpuIndexFlatConfig()
        config.device = device
        config.useFloat16 = self._vectors.dtype == np.float16
        index = faiss.GpuIndexFlatIP(resources, self._vectors.shape[1], config)
        index.resources = resources  # keeps them alive
        for start in range(0, len(self), ADD_BLOCK):
            index.add(self._vectors[start : start + ADD_BLOCK].astype(np.float32))
        self._gpu = index


def order_ties(ids: Ints, scores: Floats32) -> Found:
    """Order equal scores by lower id, in place: ids[M, k], scores[M, k], best first."""
    tied = np.flatnonzero((scores[:, 1:] >= scores[:, :-1]).any(axis=1))
    if len(tied):
        order = np.lexsort((ids[tied], -scores[tied]), axis=-1)
        ids[tied] = np.take_along_axis(ids[tied], order, axis=1)
        scores[tied] = np.take_along_axis(scores[tied], order, axis=1)
    return ids, scores


def _append(array: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Append rows to the array, in the same memory where the system can extend it (mremap).

    The array is then never in memory twice.
    """
    is_resizable = array.flags.owndata and array.flags.writeable
    owned = array if is_resizable else array.copy()
    count = len(owned)
    owned.resize((count + len(rows), *owned.shape[1:]), refcheck=False)
    owned[count:] = rows
    return owned


def _read_store(data: bytes, rows: int, plan: IndexPlan) -> DenseStore | ApproximateStore:
    start = 8 * rows
    if plan.is_exact:
        vectors: NDArray[Any] = np.frombuffer(data, DENSE_TYPES[plan.kind], offset=start)
        return DenseStore(vectors.reshape(rows, plan.dim))
    store = ApproximateStore.from_bytes(memoryview(data)[start:], plan)
    if len(store) != rows:
        raise ValueError(f"{len(store)} codes for {rows} ids")
    return store


def _check_vectors(vectors: NDArray[Any], dim: int) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"vectors{list(vectors.shape)} do not fit an index of D={dim}")
    if vectors.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(
            f"vectors of {vectors.dtype} are not float16, float32 or float64; convert them"
        )


def _check_ids(ids: Ints, count: int) -> None:
    if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"ids{list(ids.shape)} of {ids.dtype} are not one whole number for each of"
            f" {count} vectors"
        )
    if count and (ids.min() < 0 or len(np.unique(ids)) != count):
        raise ValueError("ids must be unique and not negative")


def _check_finite(vectors: NDArray[Any], first: int) -> None:
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite here
        bad = np.flatnonzero(~np.isfinite(vectors.astype(np.float32, copy=False)).all(axis=1))
    if len(bad):
        raise ValueError(f"vectors are not finite; the first is row {first + bad[0]}")
