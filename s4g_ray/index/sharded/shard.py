"""Serve one shard of the index: a range of the references' rows in each version.

ShardGroup starts IndexShard as a Ray actor; this module imports neither Ray nor torch.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.data.tables.embedding_table import read_heads
from s4g_ray.errors import RunError
from s4g_ray.index.exact_search import Engine, choose_engine, search, unit_rows
from s4g_ray.index.faiss_library import set_faiss_threads
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.sharded.sharding import (
    PartCount,
    RowRange,
    TablePart,
    check_ids,
    kept_rows,
    merge_found,
    read_ranges,
)
from s4g_ray.index.stores.gpu import GpuDevice
from s4g_ray.index.top_k import Found
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_published, published_versions


def version_folder(folder: str, version: int) -> str:
    """Return the folder where a version of the index is published."""
    return files.join(folder, f"v={version:04d}")


@dataclass(frozen=True)
class ShardSetup:
    """Arguments of a shard, the same at each of its starts."""

    folder: str
    number: int
    num_shards: int
    num_threads: int
    use_gpu: bool


@dataclass(frozen=True)
class Staged:
    """A shard of a version that is built and written but not in service yet.

    Holds what the version's manifest and report need.
    """

    version: int
    part: Part
    info: Mapping[str, Any]
    read_s: float
    build_s: float


@dataclass(frozen=True)
class _ServedVersion:
    index: VectorIndex
    num_vectors: int  # over all shards


_Versions = Mapping[int, _ServedVersion | RunError]  # an error: why a version cannot be served


class IndexShard:
    """Holds the versions in service and, during a build, the staged version beside them.

    A search reads the map of versions once, and a change replaces the map: no search sees half a
    change, and a search ends on the version that it began with.
    """

    def __init__(self, setup: ShardSetup) -> None:
        self._setup = setup
        self._staged: tuple[int, VectorIndex] | None = None
        # a thread of its own: the actor answers, and so counts as started, before all is read
        loader = ThreadPoolExecutor(1)
        self._served: Future[_Versions] = loader.submit(self.load_published)

    @property
    def _versions(self) -> _Versions:
        """The versions in service; waits until the versions published at the start are read."""
        return self._served.result()

    @_versions.setter
    def _versions(self, versions: _Versions) -> None:
        # a new future: the earlier one would keep its result in memory
        served: Future[_Versions] = Future()
        served.set_result(versions)
        self._served = served

    def versions(self) -> list[int]:
        """Return the versions that this shard serves."""
        return [
            version
            for version, served in self._versions.items()
            if isinstance(served, _ServedVersion)
        ]

    def search(self, version: int, queries: Floats32, k: int) -> Found:
        """Search this shard: queries[M, D] -> ids[M, n], scores[M, n], n = k or all it holds.

        Raises RunError for a version that is not in service, ValueError for queries or k that do
        not fit it.
        """
        versions = self._versions
        served = versions.get(version)
        if served is None:
            in_service = ", ".join(str(v) for v in versions) or "none"
            raise RunError(
                f"version {version} of {self._setup.folder} is not in service"
                f" (in service: {in_service})"
            )
        if isinstance(served, RunError):
            raise RunError(str(served))
        if not 1 <= k <= served.num_vectors:
            raise ValueError(
                f"k={k} is not within 1..{served.num_vectors}, the size of version {version}"
            )
        return served.index.search(queries, min(k, len(served.index)))

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
            ids = head.ids[kept_rows(head.ids, wanted)]
            kept.append(ids)
            counts.append(PartCount(len(ids), head.dim, head.dtype))
        return counts, np.concatenate(kept)

    def check_ids(
        self, counts: Sequence[int], sources: Sequence[TablePart], wanted: Ints | None, *ids: Ints
    ) -> None:
        """Check the kept ids that all shards read, as sharding.check_ids does."""
        check_ids(np.concatenate(ids), counts, sources, wanted)

    def sample(
        self, ranges: Sequence[RowRange], wanted: Ints | None, rows: Ints
    ) -> tuple[int, Floats32]:
        """Read some rows of the shard: their number n, and vectors[n, D]."""
        found = [vectors for _, vectors in read_ranges(ranges, wanted, rows)]
        if not found:
            return len(rows), np.zeros((0, 0), dtype=np.float32)
        return len(rows), np.concatenate(found)

    def train(self, plan: IndexPlan, *samples: Floats32) -> bytes:
        """Return the trained, empty index that all shards start from; samples[n, D]."""
        set_faiss_threads(self._setup.num_threads)
        filled = [sample for sample in samples if len(sample)]
        return VectorIndex.template(plan, np.concatenate(filled))

    def stage(
        self,
        version: int,
        ranges: Sequence[RowRange],
        wanted: Ints | None,
        plan: IndexPlan,
        template: bytes | None,
        engine: Engine,
    ) -> Staged:
        """Build a version beside those in service and write its file."""
        setup = self._setup
        set_faiss_threads(setup.num_threads)
        self._staged = None
        index = VectorIndex.empty(plan, template, engine=engine, num_threads=setup.num_threads)
        read_s = 0.0
        started = time.perf_counter()
        reading_since = started
        for ids, vectors in read_ranges(ranges, wanted):
            read_s += time.perf_counter() - reading_since
            index.add(vectors, ids)
            reading_since = time.perf_counter()
        index.seal()
        folder = version_folder(setup.folder, version)
        part = index.save_part(folder, f"shard-{setup.number:05d}.faiss")
        seconds = time.perf_counter() - started
        self._staged = (version, self._move_to_device(index))
        return Staged(version, part, index.info, read_s, seconds - read_s)

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
    ) -> Found:
        """Search the staged version as `search` does, with a given search effort."""
        index = self._find_staged(staged, engine)
        if effort is not None:
            index.effort = effort
        return index.search(queries, min(k, len(index)))

    def activate(self, version: int) -> None:
        """Put a published version in service beside the others.

        Raises RunError when the version's file cannot be loaded.
        """
        staged = None
        if self._staged is not None and self._staged[0] == version:
            staged = self._staged[1]
        served = self._load(version, staged)
        if isinstance(served, RunError):
            raise served
        self._versions = {**self._versions, version: served}
        self._staged = None

    def keep_versions(self, keep: Collection[int]) -> None:
        """Take all versions but `keep` out of service.

        The memory of a removed version is freed when its last search is done.
        """
        self._versions = {v: served for v, served in self._versions.items() if v in keep}

    def remove_version(self, version: int) -> None:
        """Take a version out of service."""
        self._versions = {v: served for v, served in self._versions.items() if v != version}

    def drop_staged(self) -> None:
        """Drop the version that was being built."""
        self._staged = None

    def load_published(self) -> _Versions:
        """Read all published versions; an error takes the place of one that cannot be read."""
        versions = published_versions(self._setup.folder, "v")
        return {version: self._load(version) for version in versions}

    def _load(self, version: int, index: VectorIndex | None = None) -> _ServedVersion | RunError:
        """Return a published version, read from its file unless `index` already holds it.

        Returns the error of a version that cannot be read.
        """
        folder = version_folder(self._setup.folder, version)
        try:
            return self._read_version(folder, index)
        except (RunError, OSError) as error:
            return RunError(str(error))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            manifest_file = files.join(folder, files.MANIFEST)
            return RunError(
                f"{manifest_file} is not of a version of shards ({error!r}); remove {folder} and"
                " resume"
            )

    def _read_version(self, folder: str, index: VectorIndex | None) -> _ServedVersion:
        setup = self._setup
        manifest = open_published(folder, "index")
        info = manifest.info
        if "num_shards" not in info:
            raise RunError(
                f"{folder} holds an index, but no version of shards; remove it and resume"
            )
        if info["num_shards"] != setup.num_shards:
            raise RunError(
                f"{folder} has {info['num_shards']} shards, but"
                f" mining.num_shards={setup.num_shards}; set that to {info['num_shards']}, or"
                f" remove {folder} and resume"
            )
        if index is None:
            index = self._read_part(folder, manifest.parts[setup.number], info, info["engine"])
        if info["effort"] is not None:
            index.effort = info["effort"]
        return _ServedVersion(index, info["num_vectors"])

    def _find_staged(self, staged: Staged, engine: Engine) -> VectorIndex:
        """Return the staged index; reads its file when this actor restarted since the build."""
        if self._staged is None or self._staged[0] != staged.version:
            folder = version_folder(self._setup.folder, staged.version)
            index = self._read_part(folder, staged.part, staged.info, engine)
            self._staged = (staged.version, index)
        return self._staged[1]

    def _read_part(
        self, folder: str, part: Part, info: Mapping[str, Any], engine: Engine
    ) -> VectorIndex:
        index = VectorIndex.load_part(
            folder, part, info, engine=engine, num_threads=self._setup.num_threads
        )
        return self._move_to_device(index)

    def _move_to_device(self, index: VectorIndex) -> VectorIndex:
        """Move the index to the GPU where one is used. Raises RunError for a missing GPU."""
        if self._setup.use_gpu:
            index.to_gpu()  # device 0: Ray shows an actor only its own GPUs
        return index
