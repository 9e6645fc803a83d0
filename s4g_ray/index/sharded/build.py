"""Build one version of a sharded index: count, train, stage, measure, publish.

The search effort (nprobe or ef_search; see VectorIndex.effort) is raised until recall@k, measured
on a sample of queries, reaches mining.min_recall.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from numpy.typing import NDArray

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
from s4g_ray.index.sharded.merging import SearchEffort, ShardAnswer, merge_found, search_filled
from s4g_ray.index.sharded.planning import plan_as
from s4g_ray.index.sharded.report import IndexReport
from s4g_ray.index.sharded.requests import Coordinates, Staged
from s4g_ray.index.sharded.shard_group import ShardGroup
from s4g_ray.index.sharded.sharding import (
    PartCount,
    RowRange,
    TablePart,
    check_vectors,
    deal_rows,
    fingerprint_ids,
    open_sources,
    sorted_ids,
)
from s4g_ray.index.sharded.versions import version_folder
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Stamp, is_published, list_versions, publish, published_versions
from s4g_ray.storage.part_commits import check_reached

VERSIONS_KEPT = 2  # on disk; shards hold the newest in memory
SAMPLE_SEED = 0


@dataclass(frozen=True)
class BuildInput:
    """Arguments of IndexService.build."""

    tables: Sequence[str]
    ids: Ints | None
    sample: Floats32 | None
    regions: NDArray[Any] | None
    coordinates: Coordinates | None
    k: int
    stamp: Stamp | None


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

    def run(self, given: BuildInput, planned: IndexPlan | None) -> IndexReport:
        """Count and check the rows, train, stage and measure the version, put it in service.

        planned: the plan that the shards were started for, whose kind and bits are built; None:
        those that the configuration asks for.
        """
        if self._cfg.gpus_per_shard:
            self._shards.broadcast("require_gpu")
        started = time.perf_counter()
        tables = [files.absolute(table) for table in given.tables]
        sources, stamp = open_sources(tables, given.stamp)
        wanted = ray.put(sorted_ids(given.ids))
        counts, dim = self._count_rows(sources, wanted, stamp)
        shares = deal_rows(sources, counts, len(self._shards))
        plan = self._plan_index(planned, sum(map(sum, counts)), dim, given.k)
        if given.sample is not None and given.sample.shape[1:] != (dim,):
            raise RunError(
                f"the sample of queries{list(given.sample.shape)} does not fit embeddings of"
                f" D={dim}"
            )
        self.engine = self.engine or str(self._shards.ask_first("choose_engine", dim))
        counted = time.perf_counter()
        template = self._train(plan, shares, wanted)
        trained = time.perf_counter()
        self._remove_published()
        coordinates = ray.put(given.coordinates)
        arguments = [
            (self._version, own, wanted, plan, template, self.engine, coordinates) for own in shares
        ]
        staged: list[Staged] = self._shards.each("stage", arguments)
        built = time.perf_counter()
        report = IndexReport(
            version=self._version,
            kind=plan.kind,
            num_vectors=plan.num_vectors,
            num_shards=len(shares),
            memory_gb=sum(shard.part.num_bytes for shard in staged) / 1e9,
            k=given.k,
            engine=self.engine,
            bits=plan.bits,
            reason=plan.reason if planned is None else planned.reason,
            effort=effort_range(plan, self._cfg)[0],
            read_s=counted - started + max(shard.read_s for shard in staged),
            build_s=trained - counted + max(shard.build_s for shard in staged),
        )
        report = self._measure(report, plan, staged, shares, wanted, given)
        report = dataclasses.replace(report, probe_s=time.perf_counter() - built)
        ids_sha256 = fingerprint_ids(given.ids)
        put_in_service(self._shards, self._folder, report, plan, staged, stamp, ids_sha256)
        return report

    def _count_rows(
        self, sources: list[TablePart], wanted: Any, stamp: Stamp | None
    ) -> tuple[list[tuple[int, ...]], int]:
        """Return the number of kept rows of each row group of each part, and D.

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
        part_counts = [sum(groups) for groups in counts]
        self._shards.ask_first("check_ids", part_counts, sources, wanted, *kept_ids)
        return counts, dim

    def _plan_index(
        self, planned: IndexPlan | None, num_vectors: int, dim: int, k: int
    ) -> IndexPlan:
        if not 1 <= k <= num_vectors:
            raise RunError(
                f"k={k} is not within 1..{num_vectors}, the number of references to index; lower k"
            )
        try:
            if planned is not None:
                return plan_as(planned, self._cfg, num_vectors, dim)
            cfg = self._cfg.model_copy(update={"num_shards": len(self._shards)})
            return plan_for(cfg, num_vectors, dim)
        except ValueError as error:
            raise RunError(str(error)) from error

    def _train(self, plan: IndexPlan, shares: Sequence[Sequence[RowRange]], wanted: Any) -> Any:
        """Train the empty index that all shards start from; return a reference to it.

        Returns None for kinds that need no training. The rows to train on do not depend on the
        number of shards.
        """
        if not plan.train_size:
            return None
        rows = ray.put(spread_rows(plan.num_vectors, plan.train_size, SAMPLE_SEED))
        arguments = [(share, wanted, rows) for share in shares]
        _, samples = self._shards.each_with_refs("sample", arguments)
        return ray.put(self._shards.ask_first("train", plan, *samples))

    def _remove_published(self) -> None:
        """Take an earlier build of this version, and later versions, out of service.

        Later versions are of a course that a run has left (it resumed from an earlier epoch). The
        files of an earlier build of this version are removed.
        """
        for version in list_versions(self._folder, "v"):
            if version >= self._version:
                withdraw(self._shards, self._folder, version)

    def _measure(
        self,
        report: IndexReport,
        plan: IndexPlan,
        staged: list[Staged],
        shares: Sequence[Sequence[RowRange]],
        wanted: Any,
        given: BuildInput,
    ) -> IndexReport:
        """Measure recall@k of the staged version, raise the search effort as far as it needs.

        Raises RunError below mining.min_recall.
        """
        sample = given.sample
        if sample is None or not len(sample):
            return report
        k = given.k
        queries = ray.put(sample)
        num_exact = min(k + 1, plan.num_vectors)
        arguments = [(own, wanted, queries, num_exact, self.engine) for own in shares]
        answers = self._shards.each("search_exactly", arguments)
        exact, exact_scores = merge_found(answers, num_exact)
        efforts: list[SearchEffort] = []

        def ask(some: Floats32, effort: int | None) -> list[ShardAnswer]:
            asked = queries if some is sample else ray.put(some)
            calls = [(shard, self.engine, asked, k, effort) for shard in staged]
            return self._shards.each("probe", calls)

        def recall_at(effort: int | None) -> RecallEstimate:
            found, taken = search_filled(ask, sample, k, effort)
            efforts.append(taken)
            return measure_recall(found[0], exact, exact_scores, given.regions)

        first, max_effort = effort_range(plan, self._cfg)
        recall, effort = raise_effort(recall_at, first, max_effort, self._cfg.min_recall)
        check_recall(recall, effort, plan, self._cfg, k)
        taken = efforts[-1]
        return dataclasses.replace(
            report,
            recall=recall.mean,
            recall_low=recall.low,
            recall_high=recall.high,
            recall_by_region={name: part.mean for name, part in recall.by_region.items()},
            effort=effort,
            mean_effort=taken.mean if effort else None,
            highest_effort=taken.highest or None,
        )


def withdraw(shards: ShardGroup, folder: str, version: int) -> None:
    """Take a version out of service, then remove its files."""
    uri = version_folder(folder, version)
    if is_published(uri):
        files.remove(files.join(uri, files.MANIFEST))
        shards.broadcast("withdraw", version)
    files.remove(uri)


def put_in_service(
    shards: ShardGroup,
    folder: str,
    report: IndexReport,
    plan: IndexPlan,
    staged: Sequence[Staged],
    stamp: Stamp | None,
    ids_sha256: str | None = None,
) -> None:
    """Publish a staged version and activate it on all shards; then older ones leave memory.

    Searches of the version before are answered until all shards serve the new one. VERSIONS_KEPT
    versions stay on disk. ids_sha256: fingerprint_ids of the ids that were asked for; None: of all,
    or of a changed version. Raises RunError for parts that are missing; the version before is then
    in service.
    """
    version = report.version
    target = version_folder(folder, version)
    parts = [shard.part for shard in staged]
    check_reached(target, parts)
    info = {**staged[0].info, **asdict(report), "plan": asdict(plan), "ids_sha256": ids_sha256}
    publish(target, "index", parts, stamp, info)
    try:
        shards.broadcast("activate", version)
    except RunError:
        withdraw(shards, folder, version)
        shards.broadcast("return_to_newest")
        raise
    shards.broadcast("release_previous")
    others = [other for other in published_versions(folder, "v") if other != version]
    kept = (*others[len(others) - (VERSIONS_KEPT - 1) :], version)
    for other in list_versions(folder, "v"):
        if other not in kept:
            files.remove(version_folder(folder, other))
