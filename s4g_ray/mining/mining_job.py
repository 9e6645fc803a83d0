"""Mine hard negatives as a Ray Data job: embeddings and an index into a NeighborGraph.

The job streams *groups* of consecutive parts of the queries' embeddings. A task reads a group,
asks the index, filters and merges its answers, writes a part of the graph and then a small commit
beside it; a job that resumes keeps what is committed. Places whose queries are in several groups
are written aside by the groups and merged by further tasks, a range of places each. The driver
holds only ids, counts and, for the overlap, a sample of the previous graph.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.exceptions import RayError

from s4g_ray import __version__
from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.tables.neighbor_graph import (
    NeighborGraph,
    choose_rows,
    publish_graph,
    read_graph_rows,
    write_graph_part,
)
from s4g_ray.errors import InputError, RunError, reason_of
from s4g_ray.mining.candidates import (
    Filters,
    Kept,
    References,
    Widths,
    check_ascending,
    find_neighbors,
    merge_neighbors,
)
from s4g_ray.mining.groups import SEARCHER_CPUS, compute_job_key
from s4g_ray.mining.job_plan import MinedPart, MiningPlan, Row
from s4g_ray.mining.overlap import SampledRows
from s4g_ray.mining.report import Counts, MiningReport
from s4g_ray.progress import Update, ignore
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp, is_published, open_published, read_part
from s4g_ray.storage.parquet import refuse_extension_types
from s4g_ray.storage.part_commits import WORK, Files, check_reached, read_commit, write_commit

# rows of a row group of candidates: a merge of a range of places reads few rows of other places
CANDIDATE_ROWS = 2_000
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
    "part_queries",
}


class Searcher(Protocol):
    """An index that Ray tasks can ask: it is pickled into them."""

    def search(self, version: int, queries: Floats32, k: int) -> tuple[Ints, Floats32]:
        """queries[M, D] -> ids[M, k], scores[M, k], best first. Raises RunError."""
        ...


@dataclass(frozen=True)
class _Tables:
    """The arrays that all tasks read, once in Ray's object store."""

    query_ids: Ints
    shared: Ints  # places of several groups
    references: References
    exclusions: Exclusions | None
    previous: SampledRows | None


@dataclass(frozen=True)
class MiningJob:
    """The values that every task is handed."""

    search: Searcher
    version: int
    embeddings: str
    target: str
    cfg: MiningConfig
    k: int
    widths: Widths
    key: str
    tables: Any  # reference to _Tables


@dataclass
class _Progress:
    """Outcomes and counts of the finished tasks, gathered by the driver."""

    on_progress: Update
    num_queries: int
    outcomes: list[MinedPart] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    num_reused: int = 0

    def add(self, outcome: MinedPart, is_reused: bool) -> None:
        """Add the outcome of a finished task, and report the progress."""
        self.outcomes.append(outcome)
        self.counts += outcome.counts
        if is_reused:
            self.num_reused += 1
        self.on_progress(self.counts.queries, self.num_queries)


def mine(
    search: Searcher,
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
    on_progress: Update = ignore,
) -> MiningReport:
    """Publish at `target` the graph of the k visually nearest other places of each query place.

    embeddings: a published table; its queries with an id of query_ids[Q] (ascending) are mined.
    reference_ids[R] (ascending) and reference_places[R]: the references in `version` of the index.
    exclusions: places that are never negatives of each other. previous: the graph that is
    replaced, for the overlap. Commits of an interrupted job are kept where they were computed from
    the same inputs; a published graph at `target` is replaced. The manifest holds the metrics, and
    `info` beside them, as info["round"].

    Raises InputError for impossible k and ids; RunError for embeddings that are unpublished,
    altered, not made from `stamp` or lack queries, and for errors of the index. Source: dynamic
    similarity sampling, arXiv 2303.11851, section 3.3.
    """
    started = time.perf_counter()
    check_ascending(query_ids, "query")
    references = References(reference_ids, reference_places)
    filters = Filters.from_config(cfg, k, exclusions)
    widths = Widths.from_references(references, filters, cfg.max_candidates)
    if previous == target:
        raise InputError(
            f"target and previous are both {target}: a graph cannot be compared with itself;"
            " choose another target"
        )
    plan = MiningPlan.from_embeddings(embeddings, query_ids, cfg, stamp)
    settings = _describe_job(version, k, widths, stamp, previous, plan.parts, cfg)
    key = compute_job_key(settings, query_ids, references, exclusions)
    tables = _share_tables(query_ids, plan, references, exclusions, previous)
    job = MiningJob(search, version, embeddings, target, cfg, k, widths, key, tables)
    if is_published(target):
        files.remove(target)
    done = _Progress(on_progress, len(query_ids) - plan.num_missing)
    _run_tasks(job, _mine_group, plan.rows, done)
    _run_tasks(job, _merge_range, plan.plan_merges(done.outcomes, cfg.part_queries), done)
    report = MiningReport.from_counts(
        done.counts,
        k,
        has_previous=previous is not None,
        without_embedding=plan.num_missing,
        seconds=time.perf_counter() - started,
        reused_parts=done.num_reused,
    )
    _publish(target, done.outcomes, k, stamp, {**(info or {}), **report.metrics()})
    return report


def _describe_job(
    version: int,
    k: int,
    widths: Widths,
    stamp: Stamp,
    previous: str | None,
    parts: list[Part],
    cfg: MiningConfig,
) -> dict[str, Any]:
    """Return the settings for compute_job_key: the values that determine the graph, no arrays."""
    return {
        "release": __version__,
        "version": version,
        "k": k,
        "widths": asdict(widths),
        "stamp": asdict(stamp),
        "previous": _fingerprint_graph(previous),
        "parts": [part.sha256 for part in parts],
        "cfg": cfg.model_dump(mode="json", include=GRAPH_SETTINGS),
    }


def _share_tables(
    query_ids: Ints,
    plan: MiningPlan,
    references: References,
    exclusions: Exclusions | None,
    previous: str | None,
) -> Any:
    """Put the arrays that all tasks read into Ray's object store, and return the reference."""
    sampled = None if previous is None else SampledRows.read(previous, plan.sample)
    if exclusions is not None and exclusions.radius_m > 0:
        exclusions.places.precompute()
    return ray.put(_Tables(query_ids, plan.shared, references, exclusions, sampled))


def _fingerprint_graph(uri: str | None) -> str | None:
    """Return a fingerprint of the contents of a published graph; None without one."""
    if uri is None:
        return None
    manifest = open_published(uri, "neighbors")
    return files.fingerprint(*(part.sha256.encode() for part in manifest.parts))


def _run_tasks(job: MiningJob, task: Callable[..., Row], rows: list[Row], done: _Progress) -> None:
    """Run a task for each row, cfg.num_searchers at a time.

    Raises RunError with the message of the first task that fails.
    """
    if not rows:
        return
    try:
        for row in _stream_tasks(job, task, rows):
            if row["fault"]:
                raise RunError(row["fault"])
            done.add(MinedPart.from_row(json.loads(row["outcome"])), row["reused"])
    except RayError as error:
        at = f"after {done.counts.queries} of {done.num_queries} queries"
        raise RunError(f"the mining job failed {at}: {reason_of(error)}") from error


def _stream_tasks(job: MiningJob, task: Callable[..., Row], rows: list[Row]) -> Iterator[Row]:
    """Run a task for each row and yield the results, in any order."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    # an error is raised once, by _run_tasks; Ray Data would log it too
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        task,
        fn_kwargs={"job": job},
        compute=ray.data.TaskPoolStrategy(size=job.cfg.num_searchers),
        num_cpus=SEARCHER_CPUS,
    )
    yield from results.iter_rows()


def _mine_group(row: Row, *, job: MiningJob) -> Row:
    """Task: mine the places of a group; write candidates for places that it shares with others."""

    def compute() -> MinedPart:
        tables: _Tables = ray.get(job.tables)
        places, kept = _search_group(row, job, tables)
        graph = merge_neighbors(places, kept.neighbors, kept.scores, job.k)
        is_shared = rows_of(tables.shared, graph.place_ids) >= 0
        own_graph = choose_rows(graph, ~is_shared)
        outcome = _write_part(job, row["number"], own_graph, Counts.from_queries(kept))
        if not is_shared.any():
            return outcome
        candidates = choose_rows(graph, is_shared)
        work = files.join(job.target, WORK)
        part = write_graph_part(work, row["number"], candidates, row_group_size=CANDIDATE_ROWS)
        return MinedPart(
            counts=outcome.counts,
            part=outcome.part,
            candidates=part,
            low=int(candidates.place_ids[0]),
            high=int(candidates.place_ids[-1]),
        )

    return _commit_once(job, f"group-{row['number']:05d}", job.key, compute)


def _search_group(row: Row, job: MiningJob, tables: _Tables) -> tuple[Ints, Kept]:
    """Return the places of a group's queries, and the neighbors that each query keeps."""
    parts = [Part(**part) for part in json.loads(row["parts"])]
    table = pa.concat_tables(
        pq.read_table(io.BytesIO(read_part(job.embeddings, part)), partitioning=None)
        for part in parts
    )
    table = refuse_extension_types(table, job.embeddings).combine_chunks()
    is_mined = rows_of(tables.query_ids, table["id"].to_numpy()) >= 0
    values = table["embedding"].combine_chunks().flatten().to_numpy()
    vectors = values.reshape(len(table), -1)[is_mined]
    own = table["place_id"].to_numpy()[is_mined]
    kept = find_neighbors(
        lambda queries, width: job.search.search(job.version, queries, width),
        vectors.astype(np.float32, copy=False),
        own,
        tables.references,
        Filters.from_config(job.cfg, job.k, tables.exclusions),
        job.widths,
        block=job.cfg.query_block,
    )
    return own, kept


def _merge_range(row: Row, *, job: MiningJob) -> Row:
    """Task: merge the candidates of all groups for a range of shared places."""

    def compute() -> MinedPart:
        uris = [files.join(job.target, WORK, part["name"]) for part in json.loads(row["parts"])]
        found = [read_graph_rows(uri, row["low"], row["high"], job.k) for uri in uris]
        places, neighbors, scores = (np.concatenate(column) for column in zip(*found, strict=True))
        merged = merge_neighbors(places, neighbors, scores, job.k)
        return _write_part(job, row["number"], merged, Counts())

    range_text = f"{row['low']} {row['high']}"
    key = files.fingerprint(job.key.encode(), row["parts"].encode(), range_text.encode())
    return _commit_once(job, f"merge-{row['number']:05d}", key, compute)


def _commit_once(job: MiningJob, name: str, key: str, compute: Callable[[], MinedPart]) -> Row:
    """Return the outcome committed under that name from the same key, or compute and commit it.

    Input and run errors are returned as row["fault"].
    """
    work = files.join(job.target, WORK)
    uri = files.join(work, f"{name}.json")

    def files_of(outcome: MinedPart) -> Files:
        return [(job.target, outcome.part), (work, outcome.candidates)]

    outcome = read_commit(uri, key, MinedPart.from_row, files_of)
    is_reused = outcome is not None
    if outcome is None:
        try:
            outcome = compute()
        except (RunError, InputError) as error:
            return {"fault": str(error), "outcome": "", "reused": False}
        write_commit(uri, key, outcome)
    return {"fault": "", "outcome": json.dumps(asdict(outcome)), "reused": is_reused}


def _write_part(job: MiningJob, number: int, graph: NeighborGraph, counts: Counts) -> MinedPart:
    """Write a part of the graph, if it has places, and add its counts to `counts`."""
    if not len(graph.place_ids):
        return MinedPart(counts, None)
    previous: SampledRows | None = ray.get(job.tables).previous
    num_compared = 0
    num_shared = 0
    if previous is not None:
        num_compared, num_shared = previous.compare(graph)
    total = counts + Counts.from_graph(graph, num_compared, num_shared)
    return MinedPart(total, write_graph_part(job.target, number, graph))


def _publish(
    target: str, outcomes: list[MinedPart], k: int, stamp: Stamp, metrics: dict[str, Any]
) -> None:
    """Publish the written parts, and remove files of earlier jobs beside them.

    Raises RunError for lost parts.
    """
    parts = [outcome.part for outcome in outcomes if outcome.part is not None]
    parts.sort(key=lambda part: part.name)
    check_reached(target, parts)
    names = {part.name for part in parts}
    for name in files.list_names(target):
        if name.startswith("part-") and name not in names:
            files.remove(files.join(target, name))
    publish_graph(target, parts, k, stamp=stamp, info={"source": "similarity", "round": metrics})
    files.remove(files.join(target, WORK))
