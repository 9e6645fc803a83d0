"""Build one version: count, train, stage, measure, publish."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import ray

from s4g_ray.arrays import Floats32, Ints, spread_rows
from s4g_ray.config.schema import MiningConfig
from s4g_ray.errors import RunError
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.recall import check_recall, effort_range, plan_for, raise_effort, recall_of
from s4g_ray.index.sharded.shard import Staged, version_folder
from s4g_ray.index.sharded.shard_group import ShardGroup
from s4g_ray.index.sharded.sharding import (
    PartCount,
    RowRange,
    TablePart,
    check_vectors,
    merge_found,
    open_sources,
    share_rows,
    sorted_ids,
)
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Stamp, is_published, list_versions, publish, published_versions
from s4g_ray.storage.part_commits import check_reached

VERSIONS_KEPT = 2
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

    def summary(self) -> dict[str, Any]:
        """Return what a graph's manifest keeps of the index that it was mined with."""
        return {
            "index": self.kind,
            "references": self.num_vectors,
            "shards": self.num_shards,
            "index_gb": self.memory_gb,
            "recall": self.recall,
            "effort": self.effort,
            "engine": self.engine,
            "index_s": self.read_s + self.build_s + self.probe_s,
        }


class VersionBuild:
    """A build of one version, in progress."""

    def __init__(
        self, cfg: MiningConfig, folder: str, shards: ShardGroup, version: int, engine: str | None
    ) -> None:
        self._cfg, self._folder, self._shards, self._version = cfg, folder, shards, version
        self.engine = engine

    def run(
        self,
        tables: Sequence[str],
        ids: Ints | None,
        sample: Floats32 | None,
        k: int,
        stamp: Stamp | None,
    ) -> IndexReport:
        """All of it: count, check, train, stage, measure, publish, put in service."""
        if self._cfg.gpus_per_shard:
            self._shards.same("require_gpu")
        clock = [time.perf_counter()]
        sources, stamp = open_sources([files.absolute(table) for table in tables], stamp)
        wanted = ray.put(sorted_ids(ids))
        counts, dim = self._count(sources, wanted, stamp)
        slices = share_rows(sources, counts, len(self._shards))
        plan = self._plan(sum(counts), dim, k)
        if sample is not None and sample.shape[1:] != (dim,):
            raise RunError(
                f"the sample of queries{list(sample.shape)} does not fit embeddings of D={dim}"
            )
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
            version=self._version,
            kind=plan.kind,
            num_vectors=plan.num_vectors,
            num_shards=len(slices),
            memory_gb=sum(s.part.num_bytes for s in staged) / 1e9,
            k=k,
            recall=recall,
            effort=effort,
            engine=self.engine,
            read_s=clock[1] - clock[0] + max(s.read_s for s in staged),
            build_s=clock[2] - clock[1] + max(s.build_s for s in staged),
            probe_s=time.perf_counter() - clock[3],
        )
        self._put_in_service(report, plan, staged, stamp)
        return report

    def _count(
        self, sources: list[TablePart], wanted: Any, stamp: Stamp | None
    ) -> tuple[list[int], int]:
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
            raise RunError(
                f"k={k} is not within 1..{num_vectors}, the number of references to index; lower k"
            )
        try:
            return plan_for(self._cfg, num_vectors, dim)
        except ValueError as error:
            raise RunError(str(error)) from error

    def _train(self, plan: IndexPlan, slices: Sequence[Sequence[RowRange]], wanted: Any) -> Any:
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
        if is_published(folder):
            files.remove(files.join(folder, files.MANIFEST))
            self._shards.same("withdraw", self._version)
        files.remove(folder)

    def _measure(
        self,
        plan: IndexPlan,
        staged: list[Staged],
        slices: Sequence[Sequence[RowRange]],
        wanted: Any,
        sample: Floats32 | None,
        k: int,
    ) -> tuple[float | None, int | None]:
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
        self, report: IndexReport, plan: IndexPlan, staged: list[Staged], stamp: Stamp | None
    ) -> None:
        """Publish, activate on all shards, then remove what is older. Raises RunError for parts that are lost."""
        folder, version = self._folder, self._version
        info = {**staged[0].info, **asdict(report), "plan": asdict(plan)}
        target, parts = version_folder(folder, version), [one.part for one in staged]
        check_reached(target, parts)
        publish(target, "index", parts, stamp, info)
        others = [v for v in published_versions(folder, "v") if v != version]
        kept = others[len(others) - (VERSIONS_KEPT - 1) :]
        try:
            self._shards.same("activate", version)
        except RunError:
            self._withdraw()
            raise
        self._shards.same("retire", (*kept, version))
        for old in list_versions(folder, "v"):
            if old not in (*kept, version):
                files.remove(version_folder(folder, old))
