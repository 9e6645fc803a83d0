"""Single stages of the loop: a collection embedded into a table, and a table mined into a graph of neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.config.loading import override_config, parse_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.exclusions import Exclusions, check_radius
from s4g_ray.data.image_table import View
from s4g_ray.data.tables.embedding_table import read_heads, sample_queries
from s4g_ray.data.train_split import find_exclusions, first_positions
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.placement import Need, check_room, shard_need
from s4g_ray.distributed.session import ray_session
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.errors import InputError
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.mining.groups import SEARCHER_CPUS
from s4g_ray.mining.mining_job import GRAPH_SETTINGS, mine
from s4g_ray.pipeline.preflight import check_index
from s4g_ray.progress import Reporter
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import Part, Stamp, is_published, open_published
from s4g_ray.storage.part_commits import claim_folder

Record = dict[str, Any]
MINING = "mining.json"
# the least num_hard_negatives, which neighbor_pool_size may not be below, counts in training alone
NO_RUN: Record = {"run_dir": "-", "data": {"uri": "-"}, "sampling": {"num_hard_negatives": 2}}
INDEX = "index"  # beside the graph while it is mined


@dataclass(frozen=True)
class _Table:
    """A published embedding table."""

    uri: str
    parts: Sequence[Part]
    stamp: Stamp

    def heads(self, view: View) -> tuple[Ints, Ints]:
        """Ids and places of a view, ids ascending. Raises InputError where there are none."""
        parts = [part for part in self.parts if part.name.startswith(f"{view}/")]
        if not parts:
            raise InputError(
                f"{self.uri} holds no {view}: neighbors are those that queries find among references"
            )
        heads = list(read_heads((self.uri, part) for part in parts))
        ids, places = (
            np.concatenate([h.ids for h in heads]),
            np.concatenate([h.place_ids for h in heads]),
        )
        order = np.argsort(ids)
        return ids[order], places[order]


@dataclass(frozen=True)
class _Collection:
    """What of a table is mined: ids ascending."""

    query_ids: Ints
    reference_ids: Ints
    reference_places: Ints
    exclusions: Exclusions | None

    @classmethod
    def of_table(cls, table: _Table) -> Self:
        """All of it. Raises InputError where a view is missing."""
        return cls(table.heads("queries")[0], *table.heads("references"), None)

    def of_split(self, config: RunConfig, dataset: GeoDataset) -> Self:
        """What is of the train split of a data set, and the false negatives that this names."""
        split = config.data.train_split
        queries, query_places = dataset.columns("queries", [split], ["id", "place_id"])
        ids, places, lat, lon = dataset.columns(
            "references", [split], ["id", "place_id", "lat", "lon"]
        )
        if not (rows_of(self.query_ids, queries) >= 0).any():
            raise InputError(
                f"the table holds no query of split {split}; embed it, or set data.train_split"
            )
        there = rows_of(self.reference_ids, ids) >= 0  # bad images are not
        everywhere = first_positions(places, lat, lon)
        exclusions = find_exclusions(config, dataset, everywhere, queries, query_places)
        if exclusions is not None:
            check_radius(everywhere, exclusions.radius_m)
        return type(self)(queries, ids[there], places[there], exclusions)


def mine_table(
    embeddings: str,
    target: str,
    *,
    dataset_uri: str | None = None,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Record:
    """Publish at `target` the graph of the visually nearest places of each query place; returns what was found.

    Of the configuration, sections mining, ray and storage count, and sampling.neighbor_pool_size. Neighbors are found
    among all references of the table, or, with a data set, among those of its data.train_split: then, in protocol
    strict, its semi-positives and what lies within sampling.exclude_radius_m are none. After an interruption the same
    call goes on with the index and the parts that are there; a finished graph is left as it is. Raises InputError for
    bad input, such as a target begun with other values, and RunError as mining.mine and IndexService.build do.
    """
    reporter, target, embeddings = (
        reporter or Reporter(),
        files.absolute(target),
        files.absolute(embeddings),
    )
    check_kept("TARGET", target)
    base = override_config(config or parse_config(NO_RUN), overrides)
    s3_settings.apply(base.storage)
    table = _open_table(embeddings)
    found = _collection_of(base, table, dataset_uri)
    check_index(base.mining, len(found.reference_ids), table.stamp.dim)
    claim_folder(target, MINING, _mined_with(base, table, dataset_uri), "a mining job")
    if is_published(target):
        reporter.line(f"{target} is finished already")
    else:
        with ray_session(base.ray, base.storage) as nodes:
            searchers = Need(base.mining.num_searchers, "searching task", SEARCHER_CPUS)
            fits = partial(
                check_room, [shard_need(base.mining, base.mining.num_shards)], [[searchers]]
            )
            await_room(base.ray, fits, nodes, reporter)
            _mine(base, table, target, found, reporter)
        files.remove(files.join(target, INDEX))
    return {"uri": target, **open_published(target, "neighbors").info["round"]}


def _open_table(uri: str) -> _Table:
    """Raises InputError for what is no table of ours."""
    if not is_published(uri):
        raise InputError(f"{uri} holds no published embedding table; make one with `s4g embed`")
    manifest = open_published(uri, "embeddings")
    if manifest.stamp is None:
        raise InputError(f"{uri} does not say what it was made from; make it with `s4g embed`")
    return _Table(uri, manifest.parts, manifest.stamp)


def _collection_of(config: RunConfig, table: _Table, dataset_uri: str | None) -> _Collection:
    """What is mined. Raises InputError for a data set that is not the table's, and for more neighbors than places."""
    found = _Collection.of_table(table)
    if dataset_uri is not None:
        dataset = open_dataset(files.absolute(dataset_uri))
        if dataset.fingerprint != table.stamp.dataset:
            raise InputError(
                f"{table.uri} was not made from {dataset.uri}: their fingerprints differ"
            )
        found = found.of_split(config, dataset)
    elif config.sampling.exclude_radius_m > 0:
        raise InputError(
            "sampling.exclude_radius_m needs the places' coordinates; name their data set with --dataset"
        )
    k, num_places = config.sampling.neighbor_pool_size, len(np.unique(found.reference_places))
    if k > num_places - 1:
        raise InputError(
            f"sampling.neighbor_pool_size={k} is too large for the {num_places} places of the references; at most"
            f" {num_places - 1} is possible"
        )
    return found


def _mined_with(config: RunConfig, table: _Table, dataset_uri: str | None) -> Record:
    """All that determines a graph."""
    parts = files.fingerprint(*(part.sha256.encode() for part in table.parts))
    made_with = {"embeddings": table.uri, "parts": parts, "k": config.sampling.neighbor_pool_size}
    if dataset_uri is not None:
        radius = config.sampling.exclude_radius_m
        made_with |= {
            "split": config.data.train_split,
            "protocol": config.protocol,
            "exclude_radius_m": radius,
        }
    return made_with | config.mining.model_dump(mode="json", include=GRAPH_SETTINGS)


def _mine(
    config: RunConfig, table: _Table, target: str, found: _Collection, reporter: Reporter
) -> None:
    """Index, then mine, and say what came out."""
    cfg, k, embeddings, stamp = (
        config.mining,
        config.sampling.neighbor_pool_size,
        table.uri,
        table.stamp,
    )
    sample = sample_queries(
        embeddings, found.query_ids, cfg.recall_sample, np.random.default_rng(config.seed)
    )
    with IndexService(
        cfg, files.join(target, INDEX), start_timeout_s=config.ray.start_timeout_s
    ) as service:
        with reporter.stage(f"indexing {len(found.reference_ids)} references"):
            index = service.report(0, stamp=stamp) or service.build(
                0, embeddings, found.reference_ids, sample=sample, k=k, stamp=stamp
            )
        recall = "" if index.recall is None else f", recall@{k} {index.recall:.3f}"
        reporter.line(
            f"index {index.kind} of {index.num_vectors} references on {index.num_shards} shards{recall}"
        )
        with reporter.stage("mining") as update:
            report = mine(
                service.client,
                0,
                embeddings,
                target,
                cfg=cfg,
                k=k,
                query_ids=found.query_ids,
                reference_ids=found.reference_ids,
                reference_places=found.reference_places,
                exclusions=found.exclusions,
                stamp=stamp,
                info=index.summary(),
                on_progress=update,
            )
    dropped = ", ".join(f"{reason} {count}" for reason, count in report.dropped.items())
    reporter.line(
        f"mined {report.neighbors} neighbors of {report.places} places ({report.coverage:.0%} of those wanted),"
        f" {report.above_positive:.0%} score above the positive; dropped: {dropped}"
    )
