"""Find the nearest vectors by cosine, with the caller's ids; imports no Ray.

The metric is the inner product of L2-normalised vectors; only VectorIndex normalises and names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Floats64, Ints
from s4g_ray.data.area import Area
from s4g_ray.errors import RunError, first_line
from s4g_ray.index.exact_search import Engine, unit_rows
from s4g_ray.index.faiss_library import faiss
from s4g_ray.index.index_file import DENSE_TYPES, from_bytes, to_bytes
from s4g_ray.index.plan import GPU_KINDS, IVF_KINDS, IndexPlan, Kind, plan_index
from s4g_ray.index.row_table import RowTable
from s4g_ray.index.stores.dense import DenseStore
from s4g_ray.index.stores.gpu import GpuDevice
from s4g_ray.index.stores.hnsw import HnswStore
from s4g_ray.index.stores.ivf import IvfStore
from s4g_ray.index.stores.ivf_training import train_lists
from s4g_ray.index.stores.store import Scope, Store
from s4g_ray.index.top_k import Found, order_ties
from s4g_ray.index.vector_checks import check_finite, check_ids, check_vectors, whole_ids
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_published, publish, read_part, write_part

ADD_BLOCK = 16_384  # vectors that are normalised at once
INDEX_FILE = "index.bin"
WIDER = 4  # times the effort of the search before, for queries that found too few


class VectorIndex:
    """Vectors and their ids: `build` makes an index in one call, `empty` and `add` step by step.

    engine: the engine that searches exact kinds (exact_search). num_threads: threads of a search,
    set process-wide; None: as many as torch has. Searches may run at the same time, but not beside
    a change.
    """

    def __init__(
        self,
        plan: IndexPlan,
        store: Store,
        table: RowTable,
        engine: Engine,
        num_threads: int | None,
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.num_threads = num_threads
        self.store = store
        self._table = table
        self._sealed = False

    @classmethod
    def build(
        cls,
        vectors: NDArray[Any],
        ids: Ints,
        *,
        coordinates: Floats64 | None = None,
        kind: Kind = "auto",
        memory_gb: float | None = None,
        engine: Engine = "auto",
        num_threads: int | None = None,
    ) -> Self:
        """Index vectors[N, D] under ids[N], unique and not negative.

        coordinates[N, 2]: lat and lon in degrees, for searches within an area. kind auto: the most
        exact kind that fits memory_gb. Raises ValueError for shapes, types or ids that cannot be
        indexed, for non-finite vectors, and for a budget that is too small.
        """
        if vectors.ndim != 2 or not len(vectors):
            raise ValueError(f"vectors{list(vectors.shape)} are not [N, D], N >= 1")
        plan = plan_index(len(vectors), vectors.shape[1], kind=kind, memory_gb=memory_gb)
        rows = np.random.default_rng(0).choice(len(vectors), plan.train_size, replace=False)
        template = cls.template(plan, vectors[np.sort(rows)])
        index = cls.empty(plan, template, engine=engine, num_threads=num_threads)
        index.add(vectors, ids, coordinates)
        index.seal()
        return index

    @staticmethod
    def template(plan: IndexPlan, sample: NDArray[Any], *, gpu: GpuDevice | None = None) -> bytes:
        """Train on sample[S, D] the empty index that all shards copy, so that their scores compare.

        S = plan.train_size is best; exact kinds and hnsw need no sample. gpu: trains there. Raises
        ValueError for a sample that does not fit.
        """
        if plan.kind not in IVF_KINDS:
            return b""
        check_vectors(sample, plan.dim)
        return train_lists(plan, unit_rows(sample), gpu)

    @classmethod
    def empty(
        cls,
        plan: IndexPlan,
        template: bytes | None = None,
        *,
        engine: Engine = "auto",
        num_threads: int | None = None,
        gpu: GpuDevice | None = None,
    ) -> Self:
        """Make an index without vectors, from a plan and the template that its shards share.

        gpu: finds the lists of vectors that are added; `to_gpu` searches there. Raises ValueError
        when the plan's kind is trained and no template is given.
        """
        store: Store
        if plan.is_exact:
            store = DenseStore(np.empty((0, plan.dim), DENSE_TYPES[plan.kind]))
        elif plan.kind == "hnsw":
            store = HnswStore.empty(plan)
        else:
            if not template:
                raise ValueError(
                    f"an index of kind {plan.kind} needs the template that its shards share"
                )
            store = IvfStore.from_bytes(template, plan.nprobe)
            if gpu is not None:
                store.add_on(gpu)
        return cls(plan, store, RowTable.empty(), engine, num_threads)

    def add(self, vectors: NDArray[Any], ids: Ints, coordinates: Floats64 | None = None) -> None:
        """Append vectors[n, D] of float16, float32 or float64, and ids[n]; copies both.

        coordinates[n, 2]: for all vectors of an index, or for none. Raises ValueError, before
        anything is added, for shapes and types that do not fit, for ids that are negative or
        repeated in the call, and for vectors that are not finite. `seal` finds ids that repeat
        over calls.
        """
        check_vectors(vectors, self.dim)
        check_ids(ids, len(vectors))
        positions = self._table.check_coordinates(coordinates, len(vectors))
        for start in range(0, len(vectors), ADD_BLOCK):
            check_finite(vectors[start : start + ADD_BLOCK], start)
        for start in range(0, len(vectors), ADD_BLOCK):
            self.store.add(unit_rows(vectors[start : start + ADD_BLOCK]))
        self._table.append(ids, positions)
        self._sealed = False

    def seal(self) -> None:
        """Check that no id was added twice; `search` and `save` call it. Raises ValueError."""
        if self._sealed:
            return
        repeated = self._table.find_repeated()
        if len(repeated):
            raise ValueError(
                f"{len(repeated)} ids were added more than once, {repeated[0]} among them;"
                " ids are unique"
            )
        self._sealed = True

    def holds(self, ids: Ints) -> NDArray[np.bool_]:
        """Return which of ids[n] the index holds."""
        return self._table.rows_of(whole_ids(ids)) >= 0

    def remove(self, ids: Ints) -> int:
        """Remove the vectors of ids[n]; return how many there were: unknown ids are passed over.

        hnsw keeps the vectors and leaves them out of answers, until half of them are removed: then
        it builds its graph anew. Other kinds are afterwards as if the vectors had not been added.
        An id that was added twice loses both. Raises ValueError for ids that are no whole numbers.
        """
        rows = self._table.all_rows_of(np.unique(whole_ids(ids)))
        if not len(rows):
            return 0
        kept = self._table.ids >= 0
        kept[rows] = False
        if self.store.keep(kept):
            self._table.keep(kept)
        else:
            self._table.mark_gone(rows)
        return len(rows)

    def replace(self, vectors: NDArray[Any], ids: Ints, coordinates: Floats64 | None = None) -> int:
        """Put vectors[n, D] under ids[n] in place of those there are; return how many there were.

        Ids that the index does not hold are added. Raises ValueError as `add` does, before
        anything changes.
        """
        check_vectors(vectors, self.dim)
        check_ids(ids, len(vectors))
        self._table.check_coordinates(coordinates, len(vectors))
        check_finite(vectors, 0)
        num_removed = self.remove(ids)
        self.add(vectors, ids, coordinates)
        return num_removed

    def __len__(self) -> int:
        return len(self._table)

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

        A higher effort makes a search slower and its recall higher. On a GPU it is at most what
        the GPU visits.
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

    @property
    def has_coordinates(self) -> bool:
        """Whether searches may be restricted to an area."""
        return self._table.coordinates is not None

    def count_allowed(self, ids: Ints | None = None, area: Area | None = None) -> int:
        """Return the number of vectors that a search within ids and an area may find."""
        rows = self._table.select(ids, area)
        return len(self) if rows is None else len(rows)

    def search(
        self, queries: NDArray[Any], k: int, *, ids: Ints | None = None, area: Area | None = None
    ) -> Found:
        """Search queries[M, D] -> ids[M, k], scores[M, k] (cosine), best first, ties by lower id.

        Finds only ids[n] (ascending) and vectors within the area, where they are given. Id -1 and
        score -inf follow where fewer than k vectors are allowed; otherwise k are found: the effort
        is raised for queries that found fewer.

        Raises ValueError when k exceeds the number of vectors, D or the type does not fit, a query
        is not finite, ids do not ascend, or the index has no coordinates to search an area by.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"k={k} is not within 1..{len(self)}, the size of the index")
        unit, scope = self._prepare(queries, ids, area)
        wanted = min(k, len(self) if scope.rows is None else len(scope.rows))
        rows, scores = self._search_once(unit, wanted, self.effort, scope)
        effort = self.effort or 1
        short = np.flatnonzero((rows < 0).any(axis=1))
        while len(short):
            if effort >= self.store.max_effort:
                rows[short], scores[short] = self.store.search_all(unit[short], wanted, scope)
                break
            effort = min(WIDER * effort, self.store.max_effort)
            rows[short], scores[short] = self.store.search(unit[short], wanted, effort, scope)
            short = short[(rows[short] < 0).any(axis=1)]
        return self._answer(rows, scores, k)

    def search_padded(
        self,
        queries: NDArray[Any],
        k: int,
        *,
        effort: int | None = None,
        ids: Ints | None = None,
        area: Area | None = None,
    ) -> Found:
        """Search as `search` does, once, at the given effort (None: the index's own).

        Id -1 and score -inf stand where the effort leads to fewer than k vectors, or fewer are
        allowed or there; k may exceed the size of the index. Raises ValueError as `search` does.
        """
        if k < 1:
            raise ValueError(f"k={k} is below 1")
        unit, scope = self._prepare(queries, ids, area)
        wanted = min(k, len(self) if scope.rows is None else len(scope.rows))
        rows, scores = self._search_once(unit, wanted, effort or self.effort, scope)
        return self._answer(rows, scores, k)

    def _prepare(
        self, queries: NDArray[Any], ids: Ints | None, area: Area | None
    ) -> tuple[Floats32, Scope]:
        """Check a search and return its queries, of length 1, and its scope."""
        self.seal()
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries{list(queries.shape)} do not fit an index of D={self.dim}")
        check_vectors(queries, self.dim)
        rows = self._table.select(ids, area)
        scope = Scope(self._table.ids, rows, self.engine, self.num_threads)
        return unit_rows(queries), scope

    def _search_once(self, unit: Floats32, k: int, effort: int | None, scope: Scope) -> Found:
        if not k or not len(unit):
            return np.empty((len(unit), k), np.int64), np.empty((len(unit), k), np.float32)
        return self.store.search(unit, k, effort, scope)

    def _answer(self, rows: Ints, scores: Floats32, k: int) -> Found:
        """Turn rows[M, n] into ids[M, k], padded with -1, and order ties."""
        ids = np.full((len(rows), k), -1, np.int64)
        padded = np.full((len(rows), k), -np.inf, np.float32)
        count = rows.shape[1]
        ids[:, :count] = np.where(rows >= 0, self._table.ids[rows], -1)
        padded[:, :count] = scores
        return order_ties(ids, padded)

    def to_gpu(self, gpu: GpuDevice | None = None) -> None:
        """Copy the index to a GPU (None: the first), which then answers unrestricted searches.

        Raises RunError for a missing GPU, and for kinds that faiss cannot search on one.
        """
        if self.kind not in GPU_KINDS:
            raise RunError(
                f"faiss searches {', '.join(GPU_KINDS)} on a GPU, not {self.kind}; set"
                " mining.index_kind to one of them"
            )
        assert isinstance(self.store, DenseStore | IvfStore)
        self.store.to_gpu(gpu or GpuDevice.open())

    def save_part(self, folder: str, name: str) -> Part:
        """Write ids and vectors as one file of a folder, which is to be published with `info`."""
        self.seal()
        data = to_bytes(self._table, self.store)
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
            table, store = from_bytes(data, plan)
            if len(table) != part.rows:
                raise ValueError(f"it has {len(table)}")
            index = cls(plan, store, table, engine, num_threads)
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
