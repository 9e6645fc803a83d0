"""The index service: versions of an index over the references, sharded over Ray actors; its client and its builds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Self

import numpy as np
import ray

from s4g_ray import storage
from s4g_ray.actors import await_start, kill
from s4g_ray.commits import check_reached
from s4g_ray.config import MiningConfig
from s4g_ray.errors import RunError
from s4g_ray.index_client import IndexClient as IndexClient
from s4g_ray.index_client import PartialResult as PartialResult
from s4g_ray.index_client import answers_of
from s4g_ray.index_effort import check_recall, effort_range, is_as_asked, plan_for, raise_effort, recall_of
from s4g_ray.index_plan import IndexPlan
from s4g_ray.index_shard import IndexShard, ShardSetup, Staged, version_folder
from s4g_ray.placement import shard_need
from s4g_ray.shards import (
    Floats,
    Found,
    Ints,
    PartCount,
    Slice,
    Source,
    check_vectors,
    merge_found,
    open_sources,
    share_rows,
    sorted_ids,
    spread_rows,
)
from s4g_ray.vector_index import VectorIndex as VectorIndex

VERSIONS_KEPT = 2
SEARCHES = 2  # that a shard answers at the same time: one is sent and merged while the other computes
RETRIES = 3  # of a call whose shard died under it; a call that kills its shard each time fails then
SAMPLE_SEED = 0


@dataclass(frozen=True)
class IndexReport:
    """A version that is in service, as it was built."""

    version: int
    kind: str
    num_vectors: int
    num_shards: int
    memory_gb: float  # of all shards' files
    k: int
    recall: float | None  # recall@k against exact search; none where no sample of queries was given
    effort: int | None  # nprobe or ef_search; none where there is nothing to choose
    engine: str  # of exact search
    read_s: float
    build_s: float
    probe_s: float


class _Shards:
    """The actors; what is asked here runs beside their searches, one call of a shard after the other."""

    def __init__(self, cfg: MiningConfig, folder: str, start_timeout_s: float) -> None:
        actor, use_gpu = ray.remote(**_shard_options(cfg))(IndexShard), cfg.gpus_per_shard > 0
        setups = [ShardSetup(folder, n, cfg.num_shards, cfg.index_threads, use_gpu) for n in range(cfg.num_shards)]
        self.client = IndexClient(tuple(actor.remote(setup) for setup in setups))
        await_start(self.client.shards, shard_need(cfg, cfg.num_shards), start_timeout_s)

    def __len__(self) -> int:
        return len(self.client.shards)

    def _ask(self, method: str, each: Sequence[Sequence[Any]], **options: Any) -> list[Any]:
        called = [getattr(shard, method) for shard in self.client.shards]
        return [
            method.options(concurrency_group="build", **options).remote(*arguments)
            for method, arguments in zip(called, each, strict=True)
        ]

    def all(self, method: str, each: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers of every shard to its own arguments. Raises RunError for a shard that fails."""
        return answers_of(self._ask(method, each))

    def both(self, method: str, each: Sequence[Sequence[Any]]) -> tuple[list[Any], list[Any]]:
        """As all, of a method that gives two things: the first, and references to the second, which stay away."""
        calls = self._ask(method, each, num_returns=2)
        kept = [call[1] for call in calls]
        return answers_of([call[0] for call in calls], kept), kept

    def same(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of every shard to the same arguments. Raises RunError for a shard that fails."""
        return self.all(method, [arguments] * len(self))

    def first(self, method: str, *arguments: Any) -> Any:
        """The answer of the first shard alone. Raises RunError when it fails."""
        call = getattr(self.client.shards[0], method).options(concurrency_group="build")
        return answers_of([call.remote(*arguments)])[0]


def _shard_options(cfg: MiningConfig) -> dict[str, Any]:
    """What Ray is told of a shard."""
    return {
        "num_cpus": cfg.cpus_per_shard,
        "num_gpus": cfg.gpus_per_shard,
        "scheduling_strategy": cfg.shard_placement,
        "label_selector": cfg.label_selector,
        "max_restarts": -1,
        "max_task_retries": RETRIES,
        # a GPU index answers one search at a time
        "concurrency_groups": {"build": 1, "search": 1 if cfg.gpus_per_shard else SEARCHES},
    }


class IndexService:
    """The shards and the versions that they serve from `folder`; a context manager that stops them.

    A shard that dies is started again and loads what is published. `engine` is that of exact search where an
    earlier start chose it: then it is not measured again. Raises RunError for shards that find no room within
    start_timeout_s; what they read afterwards may take longer.
    """

    def __init__(
        self, cfg: MiningConfig, folder: str, *, engine: str | None = None, start_timeout_s: float = 120.0
    ) -> None:
        self._cfg, self._folder = cfg, storage.absolute(folder)
        self._engine = engine or (None if cfg.exact_engine == "auto" else cfg.exact_engine)
        self._shards = _Shards(cfg, self._folder, start_timeout_s)

    @property
    def client(self) -> IndexClient:
        """What asks the shards, from any process of the cluster."""
        return self._shards.client

    @property
    def engine(self) -> str | None:
        """The engine of exact search; none until a first build has measured it."""
        return self._engine

    def search(self, version: int, queries: Floats, k: int) -> Found:
        """As IndexClient.search."""
        return self.client.search(version, queries, k)

    def search_partial(self, version: int, queries: Floats, k: int, *, timeout_s: float = 60.0) -> PartialResult:
        """As IndexClient.search_partial."""
        return self.client.search_partial(version, queries, k, timeout_s=timeout_s)

    def report(self, version: int, *, stamp: storage.Stamp | None = None) -> IndexReport | None:
        """How a version was built; None when it is not in service on every shard, or not from `stamp` or as asked now.

        The engine of exact search is taken from it where none is chosen yet.
        """
        folder = version_folder(self._folder, version)
        if not all(version in serving for serving in self._shards.same("versions")):
            return None
        manifest = storage.open_published(folder, "index")
        if (stamp is not None and manifest.stamp != stamp) or not is_as_asked(manifest.info, self._cfg):
            return None
        report = IndexReport(**{field.name: manifest.info[field.name] for field in fields(IndexReport)})
        self._engine = self._engine or report.engine
        return report

    def build(
        self,
        version: int,
        embeddings: str | Sequence[str],
        ids: Ints | None = None,
        *,
        sample: Floats | None = None,
        k: int,
        stamp: storage.Stamp | None = None,
    ) -> IndexReport:
        """Index the references of published embedding tables beside what is in service, then put that in service.

        ids: the references to index; none: all. sample[S, D]: queries that recall@k is measured on against exact
        search over the same embeddings; effort is raised until it reaches mining.min_recall, unless it is set.
        This version and the highest other ones stay, VERSIONS_KEPT in all. Raises RunError, with all versions in
        service as before, for tables, ids and k that do not fit each other or the budget of memory, for recall below
        mining.min_recall, and for a shard that fails. A version that is there already goes out of service once the
        rows of the new one are counted and checked.
        """
        tables = [embeddings] if isinstance(embeddings, str) else list(embeddings)
        build = _Build(self._cfg, self._folder, self._shards, version, self._engine)
        try:
            return build.run(tables, ids, sample, k, stamp)
        except Exception:
            with suppress(RunError):  # of a shard that is dead; why the build failed is what counts
                self._shards.same("discard")
            if not storage.is_published(version_folder(self._folder, version)):
                storage.remove(version_folder(self._folder, version))
            raise
        finally:
            self._engine = build.engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.client.shards)


class _Build:
    """A build of one version, in progress."""

    def __init__(self, cfg: MiningConfig, folder: str, shards: _Shards, version: int, engine: str | None) -> None:
        self._cfg, self._folder, self._shards, self._version = cfg, folder, shards, version
        self.engine = engine

    def run(
        self, tables: Sequence[str], ids: Ints | None, sample: Floats | None, k: int, stamp: storage.Stamp | None
    ) -> IndexReport:
        """All of it: count, check, train, stage, measure, publish, put in service."""
        if self._cfg.gpus_per_shard:
            self._shards.same("require_gpu")
        clock = [time.perf_counter()]
        sources, stamp = open_sources([storage.absolute(table) for table in tables], stamp)
        wanted = ray.put(sorted_ids(ids))
        counts, dim = self._count(sources, wanted, stamp)
        slices = share_rows(sources, counts, len(self._shards))
        plan = self._plan(sum(counts), dim, k)
        if sample is not None and sample.shape[1:] != (dim,):
            raise RunError(f"the sample of queries{list(sample.shape)} does not fit embeddings of D={dim}")
        self.engine = self.engine or str(self._shards.first("choose_engine", dim))
        clock.append(time.perf_counter())
        template = self._train(plan, slices, wanted)
        clock.append(time.perf_counter())
        self._withdraw()
        recipes = [(self._version, own, wanted, plan, template, self.engine) for own in slices]
        staged: list[Staged] = self._shards.all("stage", recipes)
        clock.append(time.perf_counter())
        recall, effort = self._measure(plan, staged, slices, wanted, sample, k)
        report = IndexReport(
            version=self._version, kind=plan.kind, num_vectors=plan.num_vectors, num_shards=len(slices),
            memory_gb=sum(s.part.num_bytes for s in staged) / 1e9, k=k, recall=recall, effort=effort,
            engine=self.engine, read_s=clock[1] - clock[0] + max(s.read_s for s in staged),
            build_s=clock[2] - clock[1] + max(s.build_s for s in staged), probe_s=time.perf_counter() - clock[3],
        )  # fmt: skip
        self._put_in_service(report, plan, staged, stamp)
        return report

    def _count(self, sources: list[Source], wanted: Any, stamp: storage.Stamp | None) -> tuple[list[int], int]:
        """The kept rows of each part, and D. Parts are divided among the shards; ids go from shard to shard."""
        bounds = [len(sources) * n // len(self._shards) for n in range(len(self._shards) + 1)]
        own = [(sources[a:b], wanted) for a, b in pairwise(bounds)]
        answers, kept_ids = self._shards.both("read_heads", own)
        heads: list[PartCount] = [head for own in answers for head in own]
        dim = check_vectors(sources, heads, stamp)
        counts = [head.kept for head in heads]
        self._shards.first("check_ids", counts, sources, wanted, *kept_ids)
        return counts, dim

    def _plan(self, num_vectors: int, dim: int, k: int) -> IndexPlan:
        if not 1 <= k <= num_vectors:
            raise RunError(f"k={k} is not within 1..{num_vectors}, the number of references to index; lower k")
        try:
            return plan_for(self._cfg, num_vectors, dim)
        except ValueError as error:
            raise RunError(str(error)) from error

    def _train(self, plan: IndexPlan, slices: Sequence[Sequence[Slice]], wanted: Any) -> Any:
        """The trained, empty index that all shards share (a reference to it); None for kinds that need no training.

        The rows to train on do not depend on the number of shards.
        """
        if not plan.train_size:
            return None
        rows = spread_rows(plan.num_vectors, plan.train_size, SAMPLE_SEED)
        sizes = [sum(len(piece) for piece in own) for own in slices]
        starts = np.cumsum([0, *sizes])
        own = [
            (pieces, wanted, rows[(rows >= first) & (rows < first + size)] - first)
            for pieces, first, size in zip(slices, starts, sizes, strict=False)
        ]
        _, samples = self._shards.both("sample", own)
        return ray.put(self._shards.first("train", plan, *samples))

    def _withdraw(self) -> None:
        """What is there of this version goes: out of service first, then its files."""
        folder = version_folder(self._folder, self._version)
        if storage.is_published(folder):
            storage.remove(storage.join(folder, storage.MANIFEST))
            self._shards.same("withdraw", self._version)
        storage.remove(folder)

    def _measure(
        self, plan: IndexPlan, staged: list[Staged], slices: Sequence[Sequence[Slice]], wanted: Any,
        sample: Floats | None, k: int,
    ) -> tuple[float | None, int | None]:  # fmt: skip
        """recall@k of what is staged, and the effort that it takes. Raises RunError below mining.min_recall."""
        effort, most = effort_range(plan, self._cfg)
        if sample is None or not len(sample):
            return None, effort
        queries = ray.put(sample)
        one_more = min(k + 1, plan.num_vectors)
        recipes = [(own, wanted, queries, one_more, self.engine) for own in slices]
        exact = merge_found(self._shards.all("search_exactly", recipes), one_more)

        def recall_at(effort: int | None) -> float:
            calls = [(one, self.engine, queries, k, effort) for one in staged]
            return recall_of(merge_found(self._shards.all("probe", calls), k)[0], *exact)

        recall, effort = raise_effort(recall_at, effort, most, self._cfg.min_recall)
        check_recall(recall, effort, plan, self._cfg, k)
        return recall, effort

    def _put_in_service(
        self, report: IndexReport, plan: IndexPlan, staged: list[Staged], stamp: storage.Stamp | None
    ) -> None:
        """Publish, activate on all shards, then remove what is older. Raises RunError for parts that are lost."""
        folder, version = self._folder, self._version
        info = {**staged[0].info, **asdict(report), "plan": asdict(plan)}
        target, parts = version_folder(folder, version), [one.part for one in staged]
        check_reached(target, parts)
        storage.publish(target, "index", parts, stamp, info)
        others = [v for v in storage.published_versions(folder, "v") if v != version]
        kept = others[len(others) - (VERSIONS_KEPT - 1) :]
        try:
            self._shards.same("activate", version)
        except RunError:
            self._withdraw()
            raise
        self._shards.same("retire", (*kept, version))
        for old in storage.list_versions(folder, "v"):
            if old not in (*kept, version):
                storage.remove(version_folder(folder, old))
