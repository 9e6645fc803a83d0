"""Serve one shard of the index: a like sample of the references in each version.

ShardGroup starts IndexShard as a Ray actor; this module imports neither Ray nor torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from s4g_ray.arrays import Bools, Floats32, Ints
from s4g_ray.data.area import Area
from s4g_ray.data.tables.embedding_table import read_heads
from s4g_ray.errors import RunError
from s4g_ray.index.exact_search import Engine, choose_engine, search, unit_rows
from s4g_ray.index.faiss_library import set_faiss_threads
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.sharded.merging import ALL, SearchEffort, ShardAnswer, merge_found
from s4g_ray.index.sharded.requests import Change, Coordinates, Staged
from s4g_ray.index.sharded.sharding import (
    PartCount,
    RowRange,
    TablePart,
    check_ids,
    kept_rows,
    pick_rows,
    read_ranges,
)
from s4g_ray.index.sharded.versions import (
    FailedVersion,
    ServedVersion,
    ShardSetup,
    load_newest,
    load_part,
    load_version,
    move_to_device,
    open_shards,
    version_folder,
)
from s4g_ray.index.stores.gpu import GpuDevice
from s4g_ray.index.top_k import Found
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage.manifest import latest_version, read_part, write_part

_Loaded = ServedVersion | FailedVersion | None


class IndexShard:
    """Holds the version in service and, during a build, the staged version beside it.

    Older versions lie on disk alone. A search reads the version in service once, and a change
    replaces it: no search sees half a change, and a search ends on the version that it began with.
    The memory of a version that was replaced is freed when its last search is done.
    """

    def __init__(self, setup: ShardSetup) -> None:
        self._setup = setup
        self._staged: tuple[int, VectorIndex] | None = None
        self._previous: ServedVersion | None = None  # while the other shards take the new version
        self._efforts: dict[int, SearchEffort] = {}
        self._counting = threading.Lock()
        # a thread of its own: the actor answers, and so counts as started, before all is read
        loader = ThreadPoolExecutor(1)
        self._loaded: Future[_Loaded] = loader.submit(load_newest, setup)

    @property
    def _served(self) -> _Loaded:
        """The version in service; waits until the version published at the start is read."""
        return self._loaded.result()

    @_served.setter
    def _served(self, served: _Loaded) -> None:
        # a new future: the earlier one would keep its result in memory
        loaded: Future[_Loaded] = Future()
        loaded.set_result(served)
        self._loaded = loaded

    def served_version(self) -> int | None:
        """Return the version that this shard serves."""
        served = self._served
        return served.version if isinstance(served, ServedVersion) else None

    def search(
        self,
        version: int,
        queries: Floats32,
        k: int,
        effort: int | None = None,
        ids: Ints | None = None,
        area: Area | None = None,
    ) -> ShardAnswer:
        """Search this shard once: queries[M, D] -> ids[M, n], scores[M, n], padded.

        n = k or all it holds. effort None: that of the version. A higher effort repeats a search
        for queries that lacked results. Raises RunError for a version that is not in service,
        ValueError for queries or k that do not fit it.
        """
        served = self.require_version(version)
        if not 1 <= k <= served.num_vectors:
            raise ValueError(
                f"k={k} is not within 1..{served.num_vectors}, the size of version {version}"
            )
        answer = search_once(served.index, queries, k, effort, ids, area)
        with self._counting:
            counted = self._efforts.get(version, SearchEffort())
            is_repeat = effort is not None
            self._efforts[version] = counted.plus(len(queries), answer.effort, is_repeat=is_repeat)
        return answer

    def effort_taken(self, version: int) -> SearchEffort:
        """Return the search effort that the queries of a version took since this shard started."""
        with self._counting:
            return self._efforts.get(version, SearchEffort())

    def require_version(self, version: int) -> ServedVersion:
        """Return the version in service. Raises RunError when it is another one, or none."""
        served = self._served
        if self._previous is not None and self._previous.version == version:
            return self._previous
        if served is None or served.version != version:
            in_service = "none" if served is None else str(served.version)
            raise RunError(
                f"version {version} of {self._setup.folder} is not in service (in service:"
                f" {in_service}); shards hold the newest version alone"
            )
        if isinstance(served, FailedVersion):
            raise RunError(str(served.error))
        return served

    def require_gpu(self) -> None:
        """Raise RunError when no GPU can be used; called before anything is read."""
        GpuDevice.open()

    def choose_engine(self, dim: int) -> Engine:
        """Return the fastest engine of exact search here, for vectors of D = dim."""
        return choose_engine(dim, self._setup.num_threads)

    def read_heads(
        self, sources: Sequence[TablePart], wanted: Ints | None
    ) -> tuple[list[PartCount], Ints]:
        """Read counts and ids of some parts: the count of each, and the kept ids[n] of all."""
        counts = []
        kept = [np.zeros(0, dtype=np.int64)]
        for head in read_heads((source.folder, source.part) for source in sources):
            rows = kept_rows(head.ids, wanted)
            kept.append(head.ids[rows])
            counts.append(PartCount(_count_by_group(rows, head.group_rows), head.dim, head.dtype))
        return counts, np.concatenate(kept)

    def check_ids(
        self, counts: Sequence[int], sources: Sequence[TablePart], wanted: Ints | None, *ids: Ints
    ) -> None:
        """Check the kept ids that all shards read, as sharding.check_ids does."""
        check_ids(np.concatenate(ids), counts, sources, wanted)

    def sample(
        self, ranges: Sequence[RowRange], wanted: Ints | None, rows: Ints
    ) -> tuple[int, tuple[Ints, Floats32]]:
        """Read those of rows[n] (counted over all tables) that are this shard's.

        Returns their number, and their row numbers with vectors[n, D].
        """
        own = pick_rows(ranges, rows)
        found = [vectors for _, vectors in read_ranges(ranges, wanted, own)]
        vectors = np.concatenate(found) if found else np.zeros((0, 0), dtype=np.float32)
        return len(own), (own, vectors)

    def _gpu(self) -> GpuDevice | None:
        """Return the shard's GPU, if it uses one."""
        return GpuDevice.open() if self._setup.use_gpu else None

    def train(self, plan: IndexPlan, *samples: tuple[Ints, Floats32]) -> bytes:
        """Return the trained, empty index that all shards start from.

        samples: row numbers and vectors[n, D] of each shard. They are put in the order of the rows:
        the template does not depend on the number of shards.
        """
        set_faiss_threads(self._setup.num_threads)
        rows = np.sort(np.concatenate([own for own, _ in samples]))
        sample = np.empty((len(rows), plan.dim), dtype=np.float32)
        for own, vectors in samples:
            if len(own):
                sample[np.searchsorted(rows, own)] = vectors
        return VectorIndex.template(plan, sample, gpu=self._gpu())

    def stage(
        self,
        version: int,
        ranges: Sequence[RowRange],
        wanted: Ints | None,
        plan: IndexPlan,
        template: bytes | None,
        engine: Engine,
        coordinates: Coordinates | None = None,
    ) -> Staged:
        """Build a version beside the one in service and write its file."""
        setup = self._setup
        set_faiss_threads(setup.num_threads)
        self._staged = None
        gpu = self._gpu()  # of this version alone: faiss's resources are not for several threads
        index = VectorIndex.empty(
            plan, template, engine=engine, num_threads=setup.num_threads, gpu=gpu
        )
        read_s = 0.0
        started = time.perf_counter()
        reading_since = started
        for ids, vectors in read_ranges(ranges, wanted):
            read_s += time.perf_counter() - reading_since
            positions = None if coordinates is None else coordinates.of(ids)
            index.add(vectors, ids, coordinates=positions)
            reading_since = time.perf_counter()
        index.seal()
        folder = version_folder(setup.folder, version)
        part = index.save_part(folder, f"shard-{setup.number:05d}.faiss")
        seconds = time.perf_counter() - started
        if gpu is not None:
            index.to_gpu(gpu)
        self._staged = (version, index)
        return Staged(version, part, index.info, read_s, seconds - read_s)

    def find_ids(self, version: int, ids: Ints) -> Bools:
        """Return which of ids[n] this shard holds in the version in service."""
        return self.require_version(version).index.holds(ids)

    def stage_change(self, base: int, version: int, change: Change | None) -> Staged:
        """Make a version from the one in service, and write its file. None: it is the same here."""
        setup = self._setup
        served = self.require_version(base)
        manifest = open_shards(setup, base)
        part = manifest.parts[setup.number]
        folder = version_folder(setup.folder, version)
        source = version_folder(setup.folder, base)
        started = time.perf_counter()
        if change is None:
            copy = write_part(folder, part.name, read_part(source, part), part.rows)
            self._staged = (version, served.index)
            return Staged(version, copy, served.index.info, time.perf_counter() - started, 0.0)
        set_faiss_threads(setup.num_threads)
        engine = manifest.info["engine"]
        index = VectorIndex.load_part(
            source, part, manifest.info, engine=engine, num_threads=setup.num_threads
        )
        read = time.perf_counter()
        change.apply(index)
        written = index.save_part(folder, part.name)
        self._staged = (version, move_to_device(setup, index))
        build_s = time.perf_counter() - read
        return Staged(version, written, index.info, read - started, build_s)

    def search_exactly(
        self,
        ranges: Sequence[RowRange],
        wanted: Ints | None,
        queries: Floats32,
        k: int,
        engine: Engine,
    ) -> Found:
        """Search this shard's rows exactly, part by part: queries[M, D] -> ids, scores[M, n].

        n = k, or the number of this shard's rows when there are fewer.
        """
        best: Found | None = None
        unit_queries = unit_rows(queries)
        for ids, vectors in read_ranges(ranges, wanted):
            rows, scores = search(
                unit_queries,
                unit_rows(vectors),
                ids,
                min(k, len(ids)),
                engine=engine,
                num_threads=self._setup.num_threads,
            )
            found = (ids[rows], scores)
            best = merge_found([found] if best is None else [best, found], k)
        assert best is not None
        return best

    def probe(
        self, staged: Staged, engine: Engine, queries: Floats32, k: int, effort: int | None
    ) -> ShardAnswer:
        """Search the staged version as `search` does, with a given search effort."""
        return search_once(self._find_staged(staged, engine), queries, k, effort, None, None)

    def activate(self, version: int) -> None:
        """Put a published version in service; the one before stays until release_previous.

        Raises RunError when the version's file cannot be loaded.
        """
        served = self._served
        if not isinstance(served, ServedVersion) or served.version != version:
            staged = None
            if self._staged is not None and self._staged[0] == version:
                staged = self._staged[1]
            served = load_version(self._setup, version, staged)
        if isinstance(served, FailedVersion):
            raise served.error
        before = self._served
        if isinstance(before, ServedVersion) and before.version != version:
            self._previous = before
        self._served = served
        self._staged = None

    def release_previous(self) -> None:
        """Take the version before out of service: all shards serve the new one."""
        self._previous = None

    def withdraw(self, version: int) -> None:
        """Take a version out of service, if it is in service."""
        if self._previous is not None and self._previous.version == version:
            self._previous = None
        served = self._served
        if served is not None and served.version == version:
            self._served = None

    def return_to_newest(self) -> None:
        """Serve the newest published version, where another one or none is in service."""
        self._staged = None
        if self._previous is not None:
            self._served = self._previous
            self._previous = None
        newest = latest_version(self._setup.folder, "v")
        served = self._served
        if newest != (None if served is None else served.version):
            del served  # frees its memory before the other one is loaded
            self._served = None
            self._served = load_newest(self._setup)

    def _find_staged(self, staged: Staged, engine: Engine) -> VectorIndex:
        """Return the staged index; reads its file when this actor restarted since the build."""
        if self._staged is None or self._staged[0] != staged.version:
            folder = version_folder(self._setup.folder, staged.version)
            index = load_part(self._setup, folder, staged.part, staged.info, engine)
            self._staged = (staged.version, index)
        return self._staged[1]


def search_once(
    index: VectorIndex,
    queries: Floats32,
    k: int,
    effort: int | None,
    ids: Ints | None,
    area: Area | None,
) -> ShardAnswer:
    """Search a shard's index at one effort; None: that of the index; ALL: as high as it takes."""
    max_effort = index.store.max_effort
    if effort == ALL and len(index):  # a shard may have lost all of its vectors
        found = index.search(queries, min(k, len(index)), ids=ids, area=area)
        return ShardAnswer(*found, max_effort, max_effort)
    effort = None if effort == ALL else effort
    found = index.search_padded(queries, k, effort=effort, ids=ids, area=area)
    num_allowed = len(index)
    if ids is not None or area is not None:
        num_allowed = index.count_allowed(ids, area) if (found[0] < 0).any() else k
    ran = min(effort or index.effort or 0, max_effort)
    return ShardAnswer(*found, ran, max_effort, num_allowed)


def _count_by_group(rows: Ints, group_rows: Sequence[int]) -> tuple[int, ...]:
    """Count rows[n] of a part (ascending) in each of its row groups."""
    ends = np.searchsorted(rows, np.cumsum(group_rows))
    return tuple(np.diff(ends, prepend=0).tolist())
