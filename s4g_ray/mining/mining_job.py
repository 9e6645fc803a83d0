"""Mine hard negatives as Ray tasks: embeddings into a NeighborGraph.

A task takes a *group* of consecutive parts of the queries' embeddings, in the order of places. It
reads part by part, asks the index, filters and merges its answers, writes a part of the graph and
then a small commit beside it; a job that resumes keeps what is committed. The driver holds ids,
places and counts and, for the overlap, a sample of the previous graph.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import ray

from s4g_ray import __version__
from s4g_ray.arrays import Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.tables.neighbor_graph import publish_graph
from s4g_ray.data.tables.query_scores import PREFIX, describe_query_scores
from s4g_ray.errors import InputError
from s4g_ray.mining.candidates import Filters, References, Widths, check_ascending
from s4g_ray.mining.carried_rows import CarryPlan
from s4g_ray.mining.cells.cell_plan import CellPlan
from s4g_ray.mining.cells.cell_tasks import (
    CellMining,
    CellSearch,
    deal_rows,
    mine_block,
    plan_blocks,
    plan_dealing,
)
from s4g_ray.mining.group_tasks import (
    Carrying,
    GlobalMining,
    MiningJob,
    Searcher,
    carry_group,
    mine_group,
)
from s4g_ray.mining.groups import compute_job_key
from s4g_ray.mining.job_plan import MinedPart, MiningPlan
from s4g_ray.mining.overlap import SampledRows
from s4g_ray.mining.positive_scores import Scoring, carry_scores, score_group, written_parts
from s4g_ray.mining.report import MiningReport
from s4g_ray.mining.stall_guard import StallGuard, expected_block_s
from s4g_ray.mining.task_runner import TaskRunner
from s4g_ray.progress import Update, ignore
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp, is_published, open_published
from s4g_ray.storage.part_commits import WORK, check_reached

# settings of the index and the filters that determine the graph; the other settings change only
# when and where it is computed
GRAPH_SETTINGS = {
    "index_kind",
    "index_memory_gb",
    "nprobe",
    "ef_search",
    "min_recall",
    "recall_sample",
    "num_shards",
    "max_score",
    "relative_margin",
    "range_min",
    "max_candidates",
    "merge_queries",
    "part_mb",
    "scope",
    "cell_places",
    "far_references",
}
# what `info` says of the index that is searched, where the settings leave it open
INDEX_SETTINGS = ("index", "bits", "shards", "effort")


def mine(
    search: Searcher | CellSearch,
    version: int,
    embeddings: str,
    target: str,
    *,
    cfg: MiningConfig,
    k: int,
    query_ids: Ints,
    reference_ids: Ints,
    reference_places: Ints,
    exclusions: Exclusions | None,
    stamp: Stamp,
    info: dict[str, Any] | None = None,
    previous: str | None = None,
    carry_from: str | None = None,
    scores_positives: bool = False,
    on_progress: Update = ignore,
) -> MiningReport:
    """Publish at `target` the graph of the k visually nearest other places of each query place.

    embeddings: a published table in the order of places; its queries with an id of query_ids[Q]
    (ascending) are mined. reference_ids[R] (ascending) and reference_places[R]: the references in
    `version` of the index that `search` asks; a CellSearch asks none. exclusions: places that are
    never negatives of each other. previous: the graph that is replaced, for the overlap.
    carry_from: a graph whose rows are kept for places without a mined query. scores_positives: with
    query_scores. Commits of an interrupted job are kept where they are of the same inputs and an
    index of the same INDEX_SETTINGS in `info`; a published graph at `target` is replaced. The
    manifest holds the metrics, and `info` beside them, as info["round"].

    Raises InputError for impossible k and ids; RunError for embeddings that are unpublished,
    altered, out of order, not made from `stamp` or lack queries, for errors of the index and of
    Ray, and where nothing progresses. Source: arXiv 2303.11851, section 3.3 (similarity sampling).
    """
    started = time.perf_counter()
    _check_not_own(target, previous, carry_from)
    check_ascending(query_ids, "query")
    references = References(reference_ids, reference_places)
    widths = Widths.from_references(
        references, Filters.from_config(cfg, k, exclusions), cfg.max_candidates
    )
    plan = MiningPlan.from_embeddings(embeddings, query_ids, cfg, k, stamp)
    sampled = None if previous is None else SampledRows.read(previous)
    job = MiningJob(
        version, embeddings, target, cfg, k, widths, query_ids, references, exclusions, sampled
    )
    graphs = {"previous": previous, "carried": carry_from}
    key = _fingerprint_job(job, search, plan, stamp, graphs, info or {})
    if is_published(target):
        files.remove(target)
    with _make_runner(job, key, plan, stamp.dim, on_progress) as runner:
        outcomes = _search(runner, job, search, plan, stamp)
        width = _carry(runner, carry_from, plan.places, job, outcomes)
        scored = _score_positives(runner, job, plan, carry_from) if scores_positives else []
    report = _report(
        runner, k, plan, time.perf_counter() - started, has_previous=previous is not None
    )
    metrics = {**(info or {}), **report.metrics()}
    _publish(target, written_parts(outcomes), scored, width, stamp, metrics)
    return report


def _check_not_own(target: str, *others: str | None) -> None:
    """Raise InputError where another graph lies at the target."""
    if target in others:
        raise InputError(
            f"target and previous or carried graph are both {target}: a graph cannot be compared"
            " with itself, or be carried into itself; choose another target"
        )


def _fingerprint_job(
    job: MiningJob,
    search: Searcher | CellSearch,
    plan: MiningPlan,
    stamp: Stamp,
    graphs: dict[str, str | None],
    info: dict[str, Any],
) -> str:
    """Return a fingerprint of all values that determine the parts of the graph."""
    cells = search if isinstance(search, CellSearch) else None
    settings = {
        "release": __version__,
        "version": job.version,
        "k": job.k,
        "widths": asdict(job.widths),
        "stamp": asdict(stamp),
        "graphs": {name: _fingerprint_graph(uri) for name, uri in graphs.items()},
        "parts": [part.sha256 for part in plan.parts],
        "index": {name: info.get(name) for name in INDEX_SETTINGS},
        "cfg": job.cfg.model_dump(mode="json", include=GRAPH_SETTINGS),
        "seed": None if cells is None else list(cells.seed),
    }
    places = None if cells is None else cells.places
    return compute_job_key(settings, job.query_ids, job.references, job.exclusions, places)


def _fingerprint_graph(uri: str | None) -> str | None:
    """Return a fingerprint of the contents of a published graph; None without one."""
    if uri is None:
        return None
    manifest = open_published(uri, "neighbors")
    return files.fingerprint(*(part.sha256.encode() for part in manifest.parts))


def _make_runner(
    job: MiningJob, key: str, plan: MiningPlan, dim: int, on_progress: Update
) -> TaskRunner:
    """Return the runner of a job's tasks; its guard allows what the job's blocks may cost."""
    cfg = job.cfg
    block_s = expected_block_s(len(job.references), dim, cfg.query_block, cfg.num_searchers)
    return TaskRunner(
        target=job.target,
        key=key,
        num_at_once=cfg.num_searchers,
        num_cpus=cfg.cpus_per_searcher,
        num_queries=plan.num_queries,
        guard=StallGuard(block_s),
        on_progress=on_progress,
    )


def _search(
    runner: TaskRunner,
    job: MiningJob,
    search: Searcher | CellSearch,
    plan: MiningPlan,
    stamp: Stamp,
) -> list[MinedPart]:
    """Mine all groups, or deal the rows to blocks of cells and mine those; return the outcomes."""
    if job.exclusions is not None and job.exclusions.radius_m > 0:
        job.exclusions.places.precompute()
    if not isinstance(search, CellSearch):
        return runner.run(mine_group, "group", ray.put(GlobalMining(job, search)), plan.rows)
    cells = CellPlan.from_places(
        search.places, plan.places, job.references, job.cfg, job.k, search.seed
    )
    shared = ray.put(CellMining(job, search.exact, cells, stamp.dim, stamp.dtype))
    dealing = plan_dealing(open_published(job.embeddings, "embeddings").parts)
    dealt = runner.run(deal_rows, "deal", shared, dealing)
    return runner.run(mine_block, "block", shared, plan_blocks(cells, dealing, dealt))


def _carry(
    runner: TaskRunner, source: str | None, mined: Ints, job: MiningJob, outcomes: list[MinedPart]
) -> int:
    """Carry rows of an earlier graph over, if any, and add the outcomes; return the greater k."""
    if source is None:
        return job.k
    plan = CarryPlan.from_graph(source, mined, job.cfg.part_mb, len(outcomes))
    shared = ray.put(Carrying(source, job.target, mined, plan.k))
    outcomes += runner.run(carry_group, "carry", shared, plan.rows)
    return max(job.k, plan.k)


def _score_positives(
    runner: TaskRunner, job: MiningJob, plan: MiningPlan, carry_from: str | None
) -> list[Part]:
    """Score queries against their own places; carry scores of an earlier graph over."""
    scoring = Scoring.from_embeddings(job.embeddings, job.target, job.query_ids, job.references.ids)
    scored = written_parts(runner.run(score_group, "score", ray.put(scoring), plan.rows))
    if carry_from is not None:
        carried = carry_scores(carry_from, job.query_ids, job.target, len(plan.rows))
        if carried is not None:
            scored.append(carried)
    return scored


def _report(
    runner: TaskRunner, k: int, plan: MiningPlan, seconds: float, *, has_previous: bool
) -> MiningReport:
    return MiningReport.from_counts(
        runner.counts,
        k,
        has_previous=has_previous,
        without_embedding=plan.num_missing,
        seconds=seconds,
        reused_parts=runner.num_reused,
    )


def _publish(
    target: str,
    parts: list[Part],
    scored: list[Part],
    k: int,
    stamp: Stamp,
    metrics: dict[str, Any],
) -> None:
    """Publish the written parts, and remove files of earlier jobs beside them.

    Raises RunError for lost parts.
    """
    parts.sort(key=lambda part: part.name)
    check_reached(target, [*parts, *scored])
    names = {part.name for part in [*parts, *scored]}
    for name in files.list_names(target):
        if name.startswith(("part-", PREFIX)) and name not in names:
            files.remove(files.join(target, name))
    info: dict[str, Any] = {"source": "similarity", "round": metrics}
    if scored:
        info.update(describe_query_scores(scored))
    publish_graph(target, parts, k, stamp=stamp, info=info)
    files.remove(files.join(target, WORK))
