"""`s4g mine`: mine an embedding table into a neighbor graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Ints
from s4g_ray.config.loading import override_config, parse_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.exclusions import Exclusions, check_radius
from s4g_ray.data.image_table import View
from s4g_ray.data.places import Places
from s4g_ray.data.tables.embedding_table import read_heads, sample_queries
from s4g_ray.data.train_split import find_exclusions, first_positions
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.placement import Need, check_room, shard_need
from s4g_ray.distributed.session import ray_session
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.errors import InputError
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.mining.cells.cell_tasks import CellSearch
from s4g_ray.mining.group_tasks import Searcher
from s4g_ray.mining.mining_job import GRAPH_SETTINGS, mine
from s4g_ray.pipeline.preflight import check_index
from s4g_ray.pipeline.rounds.cell_search import describe_cells, make_cell_search
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.progress import Reporter
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import Part, Stamp, is_published, open_published
from s4g_ray.storage.ownership.lease import owning
from s4g_ray.storage.part_commits import claim_folder

MARKER = "mining.json"  # the values that a folder was begun with
# num_hard_negatives, which neighbor_pool_size must not be below, matters in training alone: the
# lowest value
NO_RUN: Record = {"run_dir": "-", "data": {"uri": "-"}, "sampling": {"num_hard_negatives": 2}}
INDEX = "index"  # a folder beside the graph, while it is mined


@dataclass(frozen=True)
class _Table:
    """A published embedding table."""

    uri: str
    parts: Sequence[Part]
    stamp: Stamp

    def heads(self, view: View) -> tuple[Ints, Ints]:
        """Read ids (ascending) and places of a view. Raises InputError where there are none."""
        parts = [part for part in self.parts if part.name.startswith(f"{view}/")]
        if not parts:
            raise InputError(
                f"{self.uri} holds no {view}: neighbors are the references that queries find, so it"
                " needs both views"
            )
        heads = list(read_heads((self.uri, part) for part in parts))
        ids = np.concatenate([head.ids for head in heads])
        places = np.concatenate([head.place_ids for head in heads])
        order = np.argsort(ids)
        return ids[order], places[order]


@dataclass(frozen=True)
class _Collection:
    """The rows of a table that are mined; ids ascend."""

    query_ids: Ints
    reference_ids: Ints
    reference_places: Ints
    exclusions: Exclusions | None
    places: Places | None = None  # of queries and references, where a data set gives them

    @classmethod
    def from_table(cls, table: _Table) -> Self:
        """Take all rows. Raises InputError where a view is missing."""
        query_ids, _ = table.heads("queries")
        reference_ids, reference_places = table.heads("references")
        return cls(query_ids, reference_ids, reference_places, None)

    def restrict(self, config: RunConfig, dataset: GeoDataset) -> Self:
        """Return the rows of a data set's train split, with the exclusions of that split."""
        split = config.data.train_split
        queries, query_places = dataset.columns("queries", [split], ["id", "place_id"])
        ids, places, lat, lon = dataset.columns(
            "references", [split], ["id", "place_id", "lat", "lon"]
        )
        if not (rows_of(self.query_ids, queries) >= 0).any():
            raise InputError(
                f"the table holds no query of split {split}; embed it, or set data.train_split"
            )
        embedded = rows_of(self.reference_ids, ids) >= 0  # bad images are left out
        everywhere = first_positions(places, lat, lon)
        exclusions = find_exclusions(config, dataset, everywhere, queries, query_places)
        if exclusions is not None:
            check_radius(everywhere, exclusions.radius_m)
        return type(self)(queries, ids[embedded], places[embedded], exclusions, everywhere)


def mine_table(
    embeddings: str,
    target: str,
    *,
    dataset_uri: str | None = None,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    steal: bool = False,
    reporter: Reporter | None = None,
) -> Record:
    """Publish at `target` the visually nearest places of each query's place; return the record.

    Reads sections mining, ray and storage of the configuration, and sampling.neighbor_pool_size.
    Neighbors are found among all references of the table or, with a data set, among those of its
    data.train_split; protocol strict then excludes semi-positives and places within
    sampling.exclude_radius_m. After an interruption the same call resumes from the index and the
    parts that exist; a finished graph is left as it is. steal: take the folder over from a living
    process, as Lease.acquire. Raises InputError for bad input, such as a target begun with other
    values, and the RunErrors of mining_job.mine and IndexService.build.
    """
    reporter = reporter or Reporter()
    target = files.absolute(target)
    embeddings = files.absolute(embeddings)
    check_kept("TARGET", target)
    base = override_config(config or parse_config(NO_RUN), overrides)
    s3_settings.apply(base.storage)
    table = _open_table(embeddings)
    found = _collection_of(base, table, dataset_uri)
    if base.mining.scope == "global":
        check_index(base.mining, len(found.reference_ids), table.stamp.dim)
    with owning(target, reporter, steal=steal, interrupts=True):
        claim_folder(target, MARKER, _mined_with(base, table, dataset_uri), "a mining job")
        if is_published(target):
            reporter.line(f"{target} is finished already")
        else:
            _mine_on_cluster(base, table, target, found, reporter)
    return {"uri": target, **open_published(target, "neighbors").info["round"]}


def _mine_on_cluster(
    config: RunConfig, table: _Table, target: str, found: _Collection, reporter: Reporter
) -> None:
    """Mine once the cluster has room for it."""
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


def _open_table(uri: str) -> _Table:
    """Open a published embedding table. Raises InputError for a folder that holds none."""
    if not is_published(uri):
        raise InputError(f"{uri} holds no published embedding table; make one with `s4g embed`")
    manifest = open_published(uri, "embeddings")
    if manifest.stamp is None:
        raise InputError(f"{uri} has no stamp of its data set; make it with `s4g embed`")
    return _Table(uri, manifest.parts, manifest.stamp)


def _collection_of(config: RunConfig, table: _Table, dataset_uri: str | None) -> _Collection:
    """Return the rows that are mined.

    Raises InputError for a data set that is not the table's, and for more neighbors than places.
    """
    found = _Collection.from_table(table)
    if dataset_uri is not None:
        dataset = open_dataset(files.absolute(dataset_uri), config.data.image_options)
        if dataset.fingerprint != table.stamp.dataset:
            raise InputError(
                f"{table.uri} was not made from {dataset.uri}: their fingerprints differ"
            )
        found = found.restrict(config, dataset)
    elif config.sampling.exclude_radius_m > 0 or config.mining.scope == "cells":
        key = "mining.scope=cells"
        if config.sampling.exclude_radius_m > 0:
            key = "sampling.exclude_radius_m"
        raise InputError(f"{key} needs the places' coordinates; name their data set with --dataset")
    k = config.sampling.neighbor_pool_size
    num_places = len(np.unique(found.reference_places))
    if k > num_places - 1:
        raise InputError(
            f"sampling.neighbor_pool_size={k} is too large for the {num_places} places of the"
            f" references; at most {num_places - 1} is possible"
        )
    return found


def _mined_with(config: RunConfig, table: _Table, dataset_uri: str | None) -> Record:
    """Return all values that determine a graph."""
    parts = files.fingerprint(*(part.sha256.encode() for part in table.parts))
    made_with = {"embeddings": table.uri, "parts": parts, "k": config.sampling.neighbor_pool_size}
    if dataset_uri is not None:
        made_with |= {
            "split": config.data.train_split,
            "protocol": config.protocol,
            "exclude_radius_m": config.sampling.exclude_radius_m,
        }
    return made_with | config.mining.model_dump(mode="json", include=GRAPH_SETTINGS)


def _mine(
    config: RunConfig, table: _Table, target: str, found: _Collection, reporter: Reporter
) -> None:
    """Index, unless cells are searched, then mine, and report the figures."""
    cfg = config.mining
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
    table: _Table,
    target: str,
    found: _Collection,
    stack: ExitStack,
    reporter: Reporter,
) -> tuple[Searcher, Record]:
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
