"""The Ray Data job of hard-negative mining: embeddings -> index -> NeighborGraph of the visually nearest places.

The job streams *groups* of consecutive parts of the queries' embeddings: a task reads a group, asks the index, filters
and merges what it answers, writes a part of the graph and then a small commit beside it, which a job that starts again
keeps. Places whose queries stand in several groups are set aside by the groups and merged by further tasks, a range
of places each. The driver sees ids, counts and, to compare with, a sample of the previous graph alone.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
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
from s4g_ray.data.tables.embedding_table import read_heads
from s4g_ray.data.tables.neighbor_graph import (
    NeighborGraph,
    choose_rows,
    publish_graph,
    read_rows,
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
from s4g_ray.mining.groups import SEARCHER_CPUS, count_groups, cut_ranges, job_key, plan_groups
from s4g_ray.mining.overlap import SampledRows, sample_places
from s4g_ray.mining.report import Counts, MiningReport
from s4g_ray.progress import Update, ignore
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp, is_published, open_published, read_part
from s4g_ray.storage.parquet import refuse_extension_types
from s4g_ray.storage.part_commits import WORK, Files, check_reached, read_commit, write_commit

Row = dict[str, Any]
CANDIDATE_ROWS = 2_000  # in a row group: a range of places reads few others'
# settings of the index and the filters that a graph depends on; the others change when and where it is computed
DECIDING = {
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
    """The arrays that the tasks share, once in Ray's object store."""

    query_ids: Ints
    shared: Ints  # places that several groups share
    references: References
    exclusions: Exclusions | None
    previous: SampledRows | None


@dataclass(frozen=True)
class MiningJob:
    """What every task knows."""

    search: Searcher
    version: int
    embeddings: str
    target: str
    cfg: MiningConfig
    k: int
    widths: Widths
    key: str
    tables: Any  # reference to _Tables


@dataclass(frozen=True)
class MinedPart:
    """What a task wrote and counted: a part of the graph, candidates of shared places."""

    counts: Counts
    part: Part | None
    candidates: Part | None = None
    low: int = 0  # first and last place of the candidates
    high: int = 0

    @classmethod
    def from_row(cls, value: Row) -> MinedPart:
        parts = {name: value[name] and Part(**value[name]) for name in ("part", "candidates")}
        return cls(Counts.of_json(value["counts"]), low=value["low"], high=value["high"], **parts)


@dataclass(frozen=True)
class _Plan:
    """The groups of a job."""

    rows: list[Row]  # a row for each group
    sample: Ints  # places that are looked up in the previous graph
    shared: Ints  # places of several groups
    num_groups: Ints  # of each of them
    missing: int  # queries without an embedding


@dataclass
class _Progress:
    """What the driver gathers from the tasks."""

    on_progress: Update
    total: int  # queries
    outcomes: list[MinedPart] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    reused: int = 0

    def add(self, outcome: MinedPart, reused: bool) -> None:
        """A task is done."""
        self.outcomes.append(outcome)
        self.counts += outcome.counts
        self.reused += reused
        self.on_progress(self.counts.queries, self.total)


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

    embeddings: a published table; its queries with an id of query_ids[Q] (ascending) are mined. reference_ids[R]
    (ascending) and reference_places[R]: what `version` of the index holds. exclusions: places that are never
    negatives of each other. previous: the graph that is replaced, for the overlap. What an interrupted job committed
    is kept where it was made from the same, and a published graph made anew. Its manifest keeps the metrics, and
    `info` beside them, as info["round"].

    Raises InputError for impossible k and ids; RunError for embeddings that are unpublished, altered, not made from
    `stamp` or lack queries, and for what the index says. Source: dynamic similarity sampling, arXiv 2303.11851,
    section 3.3.
    """
    started = time.perf_counter()
    check_ascending(query_ids, "query")
    references = References(reference_ids, reference_places)
    widths = Widths.from_references(
        references, Filters.from_config(cfg, k, exclusions), cfg.max_candidates
    )
    if previous == target:
        raise InputError(
            f"{target} cannot be mined beside itself: previous names the graph that is replaced"
        )
    manifest = open_published(embeddings, "embeddings", stamp)
    parts = [part for part in manifest.parts if part.name.startswith("queries/")]
    plan = _plan_groups(
        embeddings, parts, query_ids, len(manifest.info.get("bad_images", ())), cfg, stamp
    )
    settings = {
        "release": __version__,
        "version": version,
        "k": k,
        "widths": asdict(widths),
        "stamp": asdict(stamp),
        "previous": _identity(previous),
        "parts": [part.sha256 for part in parts],
        "cfg": cfg.model_dump(mode="json", include=DECIDING),
    }
    key = job_key(settings, query_ids, references, exclusions)
    sampled = None if previous is None else SampledRows.read(previous, plan.sample)
    if exclusions is not None and exclusions.radius_m > 0:
        _ = exclusions.places.xyz  # kept there: or each task would reckon them anew
    tables = ray.put(_Tables(query_ids, plan.shared, references, exclusions, sampled))
    job = MiningJob(search, version, embeddings, target, cfg, k, widths, key, tables)
    if is_published(target):
        files.remove(target)
    done = _Progress(on_progress, len(query_ids) - plan.missing)
    _run(job, _mine_group, plan.rows, done)
    _run(job, _merge_range, _plan_merges(job, plan, done.outcomes), done)
    report = MiningReport.from_counts(
        done.counts,
        k,
        has_previous=previous is not None,
        without_embedding=plan.missing,
        seconds=time.perf_counter() - started,
        reused_parts=done.reused,
    )
    _publish(target, done.outcomes, k, stamp, {**(info or {}), **report.metrics()})
    return report


def _identity(graph: str | None) -> str | None:
    """What a published graph holds, as a fingerprint."""
    if graph is None:
        return None
    manifest = open_published(graph, "neighbors")
    return files.fingerprint(*(part.sha256.encode() for part in manifest.parts))


def _plan_groups(
    embeddings: str,
    parts: Sequence[Part],
    query_ids: Ints,
    bad_images: int,
    cfg: MiningConfig,
    stamp: Stamp,
) -> _Plan:
    """The job's groups, and what they share. Raises RunError for tables that do not fit."""
    ids, places = _query_columns(embeddings, parts, query_ids, stamp)
    missing = _count_missing(embeddings, query_ids, ids, bad_images)
    groups = plan_groups([len(part) for part in ids], cfg.part_queries)
    found, num_groups = count_groups(
        [np.concatenate([places[i] for i in group]) for group in groups]
    )
    shared = num_groups > 1
    rows = [
        {"number": n, "parts": json.dumps([asdict(parts[i]) for i in group])}
        for n, group in enumerate(groups)
    ]
    return _Plan(rows, sample_places(found), found[shared], num_groups[shared], missing)


def _query_columns(
    embeddings: str, parts: Sequence[Part], query_ids: Ints, stamp: Stamp
) -> tuple[list[Ints], list[Ints]]:
    """ids and places, of each part, of the queries that are mined. Raises RunError for vectors unlike the stamp's."""
    ids, places = [], []
    for part, head in zip(parts, read_heads((embeddings, part) for part in parts), strict=True):
        if (head.dim, head.dtype) != (stamp.dim, stamp.dtype):
            raise RunError(
                f"{files.join(embeddings, part.name)} holds {head.dtype} vectors of D={head.dim}, but"
                f" {stamp.dtype} of D={stamp.dim} are wanted; remove {embeddings} and resume"
            )
        mined = rows_of(query_ids, head.ids) >= 0
        ids.append(head.ids[mined])
        places.append(head.place_ids[mined])
    return ids, places


def _count_missing(embeddings: str, query_ids: Ints, ids: Sequence[Ints], bad_images: int) -> int:
    """How many queries have no embedding. Raises RunError when those are more than images were left out, or all."""
    found = np.sort(np.concatenate([np.zeros(0, np.int64), *ids]))
    twice = found[1:][found[1:] == found[:-1]]
    if len(twice):
        raise RunError(f"{embeddings} holds query id {twice[0]} twice; remove it and resume")
    lost = query_ids[rows_of(found, query_ids) < 0]
    if len(lost) > bad_images or not len(found):
        raise RunError(
            f"{len(lost)} of {len(query_ids)} queries have no embedding in {embeddings}, from which {bad_images} images"
            f" were left out; the first is query id {lost[0]}; remove {embeddings} and resume"
        )
    return len(lost)


def _run(job: MiningJob, task: Callable[..., Row], rows: list[Row], done: _Progress) -> None:
    """Run a task for each row, num_searchers at a time. Raises RunError with the message of the first that fails."""
    try:
        for row in _stream(job, task, rows) if rows else ():
            if row["fault"]:
                raise RunError(row["fault"])
            done.add(MinedPart.from_row(json.loads(row["outcome"])), row["reused"])
    except RayError as error:
        at = f"after {done.counts.queries} of {done.total} queries"
        raise RunError(f"the mining job failed {at}: {reason_of(error)}") from error


def _stream(job: MiningJob, task: Callable[..., Row], rows: list[Row]) -> Iterator[Row]:
    """The task's rows, in any order."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised and said once
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        task,
        fn_kwargs={"job": job},
        compute=ray.data.TaskPoolStrategy(size=job.cfg.num_searchers),
        num_cpus=SEARCHER_CPUS,
    )
    yield from results.iter_rows()


def _mine_group(row: Row, *, job: MiningJob) -> Row:
    """Task: the neighbors of the places of a group; candidates where other groups have queries of the place too."""

    def compute() -> MinedPart:
        tables: _Tables = ray.get(job.tables)
        places, kept = _search_group(row, job, tables)
        graph = merge_neighbors(places, kept.neighbors, kept.scores, job.k)
        shared = rows_of(tables.shared, graph.place_ids) >= 0
        outcome = _write_part(
            job, row["number"], choose_rows(graph, ~shared), Counts.of_queries(kept)
        )
        if not shared.any():
            return outcome
        candidates = choose_rows(graph, shared)
        work = files.join(job.target, WORK)
        part = write_graph_part(work, row["number"], candidates, row_group_size=CANDIDATE_ROWS)
        low, high = int(candidates.place_ids[0]), int(candidates.place_ids[-1])
        return MinedPart(outcome.counts, outcome.part, part, low, high)

    return _committed(job, f"group-{row['number']:05d}", job.key, compute)


def _search_group(row: Row, job: MiningJob, tables: _Tables) -> tuple[Ints, Kept]:
    """The places of a group's queries, and what each keeps."""
    parts = [Part(**part) for part in json.loads(row["parts"])]
    table = pa.concat_tables(
        pq.read_table(io.BytesIO(read_part(job.embeddings, part)), partitioning=None)
        for part in parts
    )
    table = refuse_extension_types(table, job.embeddings).combine_chunks()
    mined = rows_of(tables.query_ids, table["id"].to_numpy()) >= 0
    vectors = (
        table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)[mined]
    )
    own = table["place_id"].to_numpy()[mined]
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


def _plan_merges(job: MiningJob, plan: _Plan, outcomes: list[MinedPart]) -> list[Row]:
    """A row for each range of shared places: the candidates that may hold them."""
    rows, ranges = [], cut_ranges(plan.shared, plan.num_groups, job.cfg.part_queries)
    for number, (low, high) in enumerate(ranges, start=len(plan.rows)):
        touched = [
            o.candidates for o in outcomes if o.candidates and o.low <= high and o.high >= low
        ]
        parts = [asdict(part) for part in sorted(touched, key=lambda part: part.name)]
        rows.append({"number": number, "low": low, "high": high, "parts": json.dumps(parts)})
    return rows


def _merge_range(row: Row, *, job: MiningJob) -> Row:
    """Task: the neighbors of a range of shared places, from the candidates of all groups."""

    def compute() -> MinedPart:
        uris = [files.join(job.target, WORK, part["name"]) for part in json.loads(row["parts"])]
        found = [read_rows(uri, row["low"], row["high"], job.k) for uri in uris]
        places, neighbors, scores = (np.concatenate(column) for column in zip(*found, strict=True))
        merged = merge_neighbors(places, neighbors, scores, job.k)
        return _write_part(job, row["number"], merged, Counts())

    key = files.fingerprint(
        job.key.encode(), row["parts"].encode(), f"{row['low']} {row['high']}".encode()
    )
    return _committed(job, f"merge-{row['number']:05d}", key, compute)


def _committed(job: MiningJob, name: str, key: str, compute: Callable[[], MinedPart]) -> Row:
    """What an earlier job committed under that name from the same key, or what is computed and committed now."""
    uri = files.join(job.target, WORK, f"{name}.json")

    def files_of(outcome: MinedPart) -> Files:
        return [(job.target, outcome.part), (files.join(job.target, WORK), outcome.candidates)]

    outcome, reused = read_commit(uri, key, MinedPart.from_row, files_of), True
    if outcome is None:
        try:
            outcome, reused = compute(), False
        except (RunError, InputError) as error:
            return {"fault": str(error), "outcome": "", "reused": False}
        write_commit(uri, key, outcome)
    return {"fault": "", "outcome": json.dumps(asdict(outcome)), "reused": reused}


def _write_part(job: MiningJob, number: int, graph: NeighborGraph, counts: Counts) -> MinedPart:
    """Write a part of the graph, when it has places, and count it."""
    if not len(graph.place_ids):
        return MinedPart(counts, None)
    previous: SampledRows | None = ray.get(job.tables).previous
    compared = previous.compare(graph) if previous is not None else ()
    return MinedPart(
        counts + Counts.of_graph(graph, *compared), write_graph_part(job.target, number, graph)
    )


def _publish(
    target: str, outcomes: list[MinedPart], k: int, stamp: Stamp, metrics: dict[str, Any]
) -> None:
    """Publish what was written; what lies beside it from an earlier job goes. Raises RunError for lost parts."""
    parts = sorted((o.part for o in outcomes if o.part), key=lambda part: part.name)
    check_reached(target, parts)
    names = {part.name for part in parts}
    for name in files.list_names(target):
        if name.startswith("part-") and name not in names:
            files.remove(files.join(target, name))
    publish_graph(target, parts, k, stamp=stamp, info={"source": "similarity", "round": metrics})
    files.remove(files.join(target, WORK))
