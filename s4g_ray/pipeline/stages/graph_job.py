"""Mine the rows of an embedding table on a Ray cluster, into a neighbor graph."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.tables.embedding_table import sample_queries
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.placement import Need, check_room, shard_need
from s4g_ray.distributed.session import ray_session
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.mining.cells.cell_tasks import CellSearch
from s4g_ray.mining.group_tasks import Searcher
from s4g_ray.mining.mining_job import GRAPH_SETTINGS, mine
from s4g_ray.pipeline.rounds.cell_search import describe_cells, make_cell_search
from s4g_ray.pipeline.stages.mining_input import EmbeddedTable, MinedRows
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published, open_published
from s4g_ray.storage.part_commits import claim_folder

MARKER = "mining.json"  # the values that a folder was begun with
INDEX = "index"  # a folder beside the graph, while it is mined


def mine_on_cluster(
    config: RunConfig,
    table: EmbeddedTable,
    dataset_uri: str | None,
    target: str,
    found: MinedRows,
    reporter: Reporter,
) -> dict[str, Any]:
    """Publish the graph at `target`, which this process owns, and return the graph's record.

    Mines once the cluster has room for it. Raises InputError for a target begun with other values.
    """
    claim_folder(target, MARKER, _mined_with(config, table, dataset_uri), "a mining job")
    if is_published(target):
        reporter.line(f"{target} is finished already")
    else:
        _run_on_cluster(config, table, target, found, reporter)
    return {"uri": target, **open_published(target, "neighbors").info["round"]}


def _run_on_cluster(
    config: RunConfig, table: EmbeddedTable, target: str, found: MinedRows, reporter: Reporter
) -> None:
    mining = config.mining
    with ray_session(config.ray, config.storage) as nodes:
        searchers = Need(mining.num_searchers, "searching task", mining.cpus_per_searcher)
        shards = []
        if mining.scope == "global":
            shards.append(shard_need(mining, mining.least_shards))
        fits = partial(check_room, shards, [[searchers]])
        await_room(config.ray, fits, nodes, reporter)
        _mine(config, table, target, found, reporter)
    files.remove(files.join(target, INDEX))


def _mined_with(config: RunConfig, table: EmbeddedTable, dataset_uri: str | None) -> dict[str, Any]:
    """Return all values that determine a graph."""
    parts = files.fingerprint(*(part.sha256.encode() for part in table.parts))
    made_with = {"embeddings": table.uri, "parts": parts, "k": config.sampling.neighbor_pool_size}
    if dataset_uri is not None:
        made_with |= {
            "split": config.data.train_split,
            "protocol": config.protocol,
            "exclude_radius_m": config.sampling.exclude_radius_m,
        }
    return made_with | config.settled_mining.model_dump(mode="json", include=GRAPH_SETTINGS)


def _mine(
    config: RunConfig, table: EmbeddedTable, target: str, found: MinedRows, reporter: Reporter
) -> None:
    """Index, unless cells are searched, then mine, and report the figures."""
    cfg = config.settled_mining
    with ExitStack() as stack:
        search: Searcher | CellSearch
        if found.places is not None and cfg.scope == "cells":
            search = make_cell_search(cfg, found.places, table.stamp.dim, (config.seed, 0))
            info = describe_cells(search, len(found.reference_ids))
        else:
            search, info = _build_index(config, table, target, found, stack, reporter)
        with reporter.stage("mining") as update:
            report = mine(
                search,
                0,
                table.uri,
                target,
                cfg=cfg,
                k=config.sampling.neighbor_pool_size,
                query_ids=found.query_ids,
                reference_ids=found.reference_ids,
                reference_places=found.reference_places,
                exclusions=found.exclusions,
                stamp=table.stamp,
                info=info,
                on_progress=update,
            )
    dropped = ", ".join(f"{reason} {count}" for reason, count in report.dropped.items())
    reporter.line(
        f"mined {count_noun(report.neighbors, 'neighbor')} of {count_noun(report.places, 'place')}"
        f" ({report.coverage:.0%} of"
        f" those wanted), {report.above_positive:.0%} score above the positive; dropped: {dropped}"
    )
    if report.warning is not None:
        reporter.line(report.warning)


def _build_index(
    config: RunConfig,
    table: EmbeddedTable,
    target: str,
    found: MinedRows,
    stack: ExitStack,
    reporter: Reporter,
) -> tuple[Searcher, dict[str, Any]]:
    """Start an index, which the stack stops, and build its version 0 where there is none yet."""
    cfg = config.mining
    k = config.sampling.neighbor_pool_size
    stamp = table.stamp
    references = found.reference_ids
    service = IndexService(
        cfg,
        files.join(target, INDEX),
        num_vectors=len(references),
        dim=stamp.dim,
        num_queries=len(found.query_ids),
        swaps=False,
        start_timeout_s=config.ray.start_timeout_s,
    )
    stack.enter_context(service)
    with reporter.stage(f"indexing {count_noun(len(references), 'reference')}"):
        index = service.report(0, stamp=stamp, ids=references)
        if index is None:
            rng = np.random.default_rng(config.seed)
            _, sample = sample_queries(table.uri, found.query_ids, cfg.recall_sample, rng)
            index = service.build(0, table.uri, references, sample=sample, k=k, stamp=stamp)
    reporter.line(f"index: {index.describe()} ({index.reason})")
    return service.client, index.summary()
