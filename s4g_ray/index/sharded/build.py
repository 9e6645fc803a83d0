"""Build one version of a sharded index: count, train, stage, measure, publish.

The search effort (nprobe or ef_search; see VectorIndex.effort) is raised until recall@k, measured
on a sample of queries, reaches mining.min_recall.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray

from s4g_ray.arrays import Floats32, Ints, spread_rows
from s4g_ray.config.schema import MiningConfig
from s4g_ray.errors import RunError
from s4g_ray.index.plan import IndexPlan, plan_for
from s4g_ray.index.recall import (
    RecallEstimate,
    check_recall,
    effort_range,
    measure_recall,
    raise_effort,
)
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
    """Report on the build of a version in service."""

    version: int
    kind: str
    num_vectors: int
    num_shards: int
    memory_gb: float  # of all shards' files
    k: int
    recall: float | None  # recall@k against exact search; None without a sample of queries
    effort: int | None  # nprobe or ef_search; None for exact kinds
    engine: str  # of exact search
    read_s: float
    build_s: float
    probe_s: float

    def summary(self) -> dict[str, Any]:
        """Return the fields that the manifest of a graph mined with this index keeps."""
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
    """The build of one version."""

    def __init__(
        self, cfg: MiningConfig, folder: str, shards: ShardGroup, version: int, engine: str | None
    ) -> None:
        self._cfg = cfg
        self._folder = folder
        self._shards = shards
        self._version = version
        self.engine = engine

    def run(
        self,
        tables: Sequence[str],
        ids: Ints | None,
        sample: Floats32 | None,
        k: int,
        stamp: Stamp | None,
    ) -> IndexReport:
        """Count and check the rows, train, stage and measure the version, put it in service.

        tables, ids, sample, k and stamp are those of IndexService.build.
        """
        if self._cfg.gpus_per_shard:
            self._shards.broadcast("require_gpu")
        started = time.perf_counter()
        sources, stamp = open_sources([files.absolute(table) for table in tables], stamp)
        wanted = ray.put(sorted_ids(ids))
        counts, dim = self._count_rows(sources, wanted, stamp)
        shares = share_rows(sources, counts, len(self._shards))
        plan = self._plan_index(sum(counts), dim, k)
        if sample is not None and sample.shape[1:] != (dim,):
            raise RunError(
                f"the sample of queries{list(sample.shape)} does not fit embeddings of D={dim}"
            )
        self.engine = self.engine or str(self._shards.ask_first("choose_engine", dim))
        counted = time.perf_counter()
        template = self._train(plan, shares, wanted)
        trained = time.perf_counter()
        self._remove_published()
        arguments = [(self._version, own, wanted, plan, template, self.engine) for own in shares]
        staged: list[Staged] = self._shards.each("stage", arguments)
        built = time.perf_counter()
        recall, effort = self._measure(plan, staged, shares, wanted, sample, k)
        report = IndexReport(
            version=self._version,
            kind=plan.kind,
            num_vectors=plan.num_vectors,
            num_shards=len(shares),
            memory_gb=sum(shard.part.num_bytes for shard in staged) / 1e9,
            k=k,
            recall=recall,
            effort=effort,
            engine=self.engine,
            read_s=counted - started + max(shard.read_s for shard in staged),
            build_s=trained - counted + max(shard.build_s for shard in staged),
            probe_s=time.perf_counter() - built,
        )
        self._put_in_service(report, plan, staged, stamp)
        return report

    def _count_rows(
        self, sources: list[TablePart], wanted: Any, stamp: Stamp | None
    ) -> tuple[list[int], int]:
        """Return the number of kept rows of each part, and D.

        Divides the parts among the shards. The first shard checks the ids, which go to it from
        the other shards directly.
        """
        num_shards = len(self._shards)
        bounds = [len(sources) * shard // num_shards for shard in range(num_shards + 1)]
        arguments = [
            (sources[bounds[shard] : bounds[shard + 1]], wanted) for shard in range(num_shards)
        ]
        answers, kept_ids = self._shards.each_with_refs("read_heads", arguments)
        heads: list[PartCount] = [head for answer in answers for head in answer]
        dim = check_vectors(sources, heads, stamp)
        counts = [head.kept for head in heads]
        self._shards.ask_first("check_ids", counts, sources, wanted, *kept_ids)
        return counts, dim

    def _plan_index(self, num_vectors: int, dim: int, k: int) -> IndexPlan:
        if not 1 <= k <= num_vectors:
            raise RunError(
                f"k={k} is not within 1..{num_vectors}, the number of references to index; lower k"
            )
        try:
            return plan_for(self._cfg, num_vectors, dim)
        except ValueError as error:
            raise RunError(str(error)) from error

    def _train(self, plan: IndexPlan, shares: Sequence[Sequence[RowRange]], wanted: Any) -> Any:
        """Train the empty index that all shards start from; return a reference to it.

        Returns None for kinds that need no training. The rows to train on do not depend on the
        number of shards.
        """
        if not plan.train_size:
            return None
        rows = spread_rows(plan.num_vectors, plan.train_size, SAMPLE_SEED)
        arguments = []
        first = 0
        for share in shares:
            last = first + sum(len(piece) for piece in share)
            arguments.append((share, wanted, rows[(rows >= first) & (rows < last)] - first))
            first = last
        _, samples = self._shards.each_with_refs("sample", arguments)
        return ray.put(self._shards.ask_first("train", plan, *samples))

    def _remove_published(self) -> None:
        """Take an earlier build of this version out of service, then remove its files."""
        folder = version_folder(self._folder, self._version)
        if is_published(folder):
            files.remove(files.join(folder, files.MANIFEST))
            self._shards.broadcast("remove_version", self._version)
        files.remove(folder)

    def _measure(
        self,
        plan: IndexPlan,
        staged: list[Staged],
        shares: Sequence[Sequence[RowRange]],
        wanted: Any,
        sample: Floats32 | None,
        k: int,
    ) -> tuple[float | None, int | None]:
        """Measure recall@k of the staged version; return it with the search effort it needs.

        Raises RunError below mining.min_recall.
        """
        effort, max_effort = effort_range(plan, self._cfg)
        if sample is None or not len(sample):
            return None, effort
        queries = ray.put(sample)
        num_exact = min(k + 1, plan.num_vectors)
        arguments = [(own, wanted, queries, num_exact, self.engine) for own in shares]
        answers = self._shards.each("search_exactly", arguments)
        exact, exact_scores = merge_found(answers, num_exact)

        def recall_at(effort: int | None) -> RecallEstimate:
            calls = [(shard, self.engine, queries, k, effort) for shard in staged]
            found, _ = merge_found(self._shards.each("probe", calls), k)
            return measure_recall(found, exact, exact_scores)

        recall, effort = raise_effort(recall_at, effort, max_effort, self._cfg.min_recall)
        check_recall(recall, effort, plan, self._cfg, k)
        return recall.mean, effort

    def _put_in_service(
        self, report: IndexReport, plan: IndexPlan, staged: list[Staged], stamp: Stamp | None
    ) -> None:
        """Publish the version, activate it on all shards, then remove older versions.

        Keeps VERSIONS_KEPT versions. Raises RunError for parts that are missing.
        """
        target = version_folder(self._folder, self._version)
        parts = [shard.part for shard in staged]
        check_reached(target, parts)
        info = {**staged[0].info, **asdict(report), "plan": asdict(plan)}
        publish(target, "index", parts, stamp, info)
        others = [v for v in published_versions(self._folder, "v") if v != self._version]
        kept = (*others[len(others) - (VERSIONS_KEPT - 1) :], self._version)
        try:
            self._shards.broadcast("activate", self._version)
        except RunError:
            self._remove_published()
            raise
        self._shards.broadcast("keep_versions", kept)
        for version in list_versions(self._folder, "v"):
            if version not in kept:
                files.remove(version_folder(self._folder, version))
