"""One shard of the index: a range of the references' rows in each version. IndexService makes actors of it.

Tasks that search import this module too, as every holder of an actor's handle does: it must start
without torch.
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
from s4g_ray.index.approximate_search import gpu_resources
from s4g_ray.index.exact_search import Engine, choose_engine, search, unit_rows
from s4g_ray.index.faiss_library import set_faiss_threads
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.sharded.sharding import (
    Found,
    PartCount,
    RowRange,
    TablePart,
    check_ids,
    kept_rows,
    merge_found,
    read_slices,
)
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_published, published_versions


def version_folder(folder: str, version: int) -> str:
    """Where a version of the index is published."""
    return files.join(folder, f"v={version:04d}")


@dataclass(frozen=True)
class ShardSetup:
    """What a shard is told when it starts, and when it starts again."""

    folder: str
    number: int
    num_shards: int
    num_threads: int
    use_gpu: bool


@dataclass(frozen=True)
class Staged:
    """A shard of a version that is built and written, but not in service: what its manifest and its report need."""

    version: int
    part: Part
    info: Mapping[str, Any]
    read_s: float
    build_s: float


@dataclass(frozen=True)
class _Held:
    index: VectorIndex
    num_vectors: int  # over all shards


_Versions = Mapping[int, _Held | RunError]


class IndexShard:
    """Holds the versions in service and, while one is built, that one beside them.

    A search reads the map of versions once, and a change replaces the map: no search sees half a change, and one
    that began on a version ends on it.
    """

    def __init__(self, setup: ShardSetup) -> None:
        self._setup = setup
        self._staged: tuple[int, VectorIndex] | None = None
        loader = ThreadPoolExecutor(
            1
        )  # an actor has started when it answers, which is not when all is read
        self._served: Future[_Versions] = loader.submit(self._load_published)

    @property
    def _versions(self) -> _Versions:
        """What is in service; waits for the files of what was published when this started."""
        return self._served.result()

    @_versions.setter
    def _versions(self, versions: _Versions) -> None:
        served: Future[_Versions] = (
            Future()
        )  # in place of that before, whose result would stay in memory
        served.set_result(versions)
        self._served = served

    def versions(self) -> list[int]:
        """The versions that this shard serves."""
        return [version for version, held in self._versions.items() if isinstance(held, _Held)]

    def search(self, version: int, queries: Floats32, k: int) -> Found:
        """queries[M, D] -> the best ids[M, n], scores[M, n] of this shard, n = k or all that it holds.

        Raises RunError for a version that is not here, ValueError for queries or k that do not fit it.
        """
        versions = self._versions
        held = versions.get(version)
        if held is None:
            there = ", ".join(str(v) for v in versions) or "none"
            raise RunError(
                f"version {version} of {self._setup.folder} is not in service (in service: {there})"
            )
        if isinstance(held, RunError):
            raise RunError(str(held))
        if not 1 <= k <= held.num_vectors:
            raise ValueError(
                f"k={k} is not within 1..{held.num_vectors}, the size of version {version}"
            )
        return held.index.search(queries, min(k, len(held.index)))

    def require_gpu(self) -> None:
        """Raises RunError where no GPU can be used, before anything is read."""
        gpu_resources(0)

    def choose_engine(self, dim: int) -> Engine:
        """The faster engine of exact search here, for vectors of D = dim."""
        return choose_engine(dim, self._setup.num_threads)

    def read_heads(
        self, sources: Sequence[TablePart], wanted: Ints | None
    ) -> tuple[list[PartCount], Ints]:
        """The count of each part, and the kept ids[n] of all of them."""
        counts, kept = [], [np.zeros(0, dtype=np.int64)]
        for head in read_heads((source.folder, source.part) for source in sources):
            kept.append(head.ids[kept_rows(head.ids, wanted)])
            counts.append(PartCount(len(kept[-1]), head.dim, head.dtype))
        return counts, np.concatenate(kept)

    def check_ids(
        self, counts: Sequence[int], sources: Sequence[TablePart], wanted: Ints | None, *ids: Ints
    ) -> None:
        """As shards.check_ids, of the kept ids that the shards read."""
        check_ids(np.concatenate(ids), counts, sources, wanted)

    def sample(
        self, slices: Sequence[RowRange], wanted: Ints | None, rows: Ints
    ) -> tuple[int, Floats32]:
        """n and vectors[n, D] of some rows of the shard."""
        found = [vectors for _, vectors in read_slices(slices, wanted, rows)]
        return len(rows), np.concatenate(found) if found else np.zeros((0, 0), dtype=np.float32)

    def train(self, plan: IndexPlan, *samples: Floats32) -> bytes:
        """The trained, empty index that all shards start from."""
        set_faiss_threads(self._setup.num_threads)
        return VectorIndex.template(
            plan, np.concatenate([sample for sample in samples if len(sample)])
        )

    def stage(
        self,
        version: int,
        slices: Sequence[RowRange],
        wanted: Ints | None,
        plan: IndexPlan,
        template: bytes | None,
        engine: Engine,
    ) -> Staged:
        """Build a version beside those in service and write its file."""
        set_faiss_threads(self._setup.num_threads)
        self._staged = None
        setup, read_s = self._setup, 0.0
        index = VectorIndex.empty(plan, template, engine=engine, num_threads=setup.num_threads)
        started = began = time.perf_counter()
        for ids, vectors in read_slices(slices, wanted):
            read_s += time.perf_counter() - began
            index.add(vectors, ids)
            began = time.perf_counter()
        index.seal()
        part = index.save_part(
            version_folder(setup.folder, version), f"shard-{setup.number:05d}.faiss"
        )
        seconds = time.perf_counter() - started
        self._staged = (version, self._place(index))
        return Staged(version, part, index.info, read_s, seconds - read_s)

    def search_exactly(
        self,
        slices: Sequence[RowRange],
        wanted: Ints | None,
        queries: Floats32,
        k: int,
        engine: Engine,
    ) -> Found:
        """queries[M, D] -> the best of this shard's rows by exact search over its parts, one after the other."""
        best: Found | None = None
        queries, threads = unit_rows(queries), self._setup.num_threads
        for ids, vectors in read_slices(slices, wanted):
            rows, scores = search(
                queries,
                unit_rows(vectors),
                ids,
                min(k, len(ids)),
                engine=engine,
                num_threads=threads,
            )
            best = merge_found([best, (ids[rows], scores)] if best else [(ids[rows], scores)], k)
        assert best is not None
        return best

    def probe(
        self, staged: Staged, engine: Engine, queries: Floats32, k: int, effort: int | None
    ) -> Found:
        """As search, on the version that is being built, at some effort."""
        index = self._staged_index(staged, engine)
        if effort is not None:
            index.effort = effort
        return index.search(queries, min(k, len(index)))

    def activate(self, version: int) -> None:
        """Put a published version in service beside the others.

        Raises RunError when the version's file cannot be loaded.
        """
        staged = self._staged[1] if self._staged and self._staged[0] == version else None
        held = self._load(version, staged)
        if isinstance(held, RunError):
            raise held
        self._versions = {**self._versions, version: held}
        self._staged = None

    def retire(self, keep: Collection[int]) -> None:
        """Take all versions but those of `keep` out of service; each goes when its last search is done."""
        self._versions = {v: held for v, held in self._versions.items() if v in keep}

    def withdraw(self, version: int) -> None:
        """Take a version out of service."""
        self._versions = {v: held for v, held in self._versions.items() if v != version}

    def discard(self) -> None:
        """Forget the version that was being built."""
        self._staged = None

    def _load_published(self) -> _Versions:
        return {
            version: self._load(version) for version in published_versions(self._setup.folder, "v")
        }

    def _load(self, version: int, index: VectorIndex | None = None) -> _Held | RunError:
        """A published version as its manifest says, from its file unless `index` is that already."""
        setup, folder = self._setup, version_folder(self._setup.folder, version)
        try:
            manifest = open_published(folder, "index")
            info = manifest.info
            if "num_shards" not in info:
                raise RunError(
                    f"{folder} holds an index, but no version of shards; remove it and resume"
                )
            if info["num_shards"] != setup.num_shards:
                raise RunError(
                    f"{folder} has {info['num_shards']} shards, but mining.num_shards={setup.num_shards};"
                    f" set that to {info['num_shards']}, or remove {folder} and resume"
                )
            if index is None:
                index = self._read(folder, manifest.parts[setup.number], info, info["engine"])
            if info["effort"] is not None:
                index.effort = info["effort"]
            return _Held(index, info["num_vectors"])
        except (RunError, OSError) as error:
            return RunError(str(error))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            manifest_file = files.join(folder, files.MANIFEST)
            return RunError(
                f"{manifest_file} is not of a version of shards ({error!r}); remove {folder} and resume"
            )

    def _staged_index(self, staged: Staged, engine: Engine) -> VectorIndex:
        """The staged index; from its file when this actor was started again after it had built it."""
        if self._staged is None or self._staged[0] != staged.version:
            folder = version_folder(self._setup.folder, staged.version)
            self._staged = (staged.version, self._read(folder, staged.part, staged.info, engine))
        return self._staged[1]

    def _read(
        self, folder: str, part: Part, info: Mapping[str, Any], engine: Engine
    ) -> VectorIndex:
        return self._place(
            VectorIndex.load_part(
                folder, part, info, engine=engine, num_threads=self._setup.num_threads
            )
        )

    def _place(self, index: VectorIndex) -> VectorIndex:
        """The index where it is to search. Raises RunError for a GPU that is not there."""
        if self._setup.use_gpu:
            index.to_gpu()  # Ray shows an actor its own GPUs alone
        return index
