"""Miner: index the embeddings of each collection of references, and mine its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Bools, Ints
from s4g_ray.config.schema import MiningConfig, RayConfig
from s4g_ray.data.tables.embedding_table import open_embeddings, read_heads, sample_queries
from s4g_ray.distributed.placement_gate import PlacementGate
from s4g_ray.errors import RunError
from s4g_ray.index.sharded.planning import await_nodes
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.mining.cells.cell_tasks import CellSearch
from s4g_ray.mining.group_tasks import Searcher
from s4g_ray.mining.mining_job import mine
from s4g_ray.mining.report import MiningReport
from s4g_ray.pipeline.rounds.cell_search import describe_cells, make_cell_search
from s4g_ray.pipeline.rounds.graphs import Collection, RunGraphs
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.progress import Reporter
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage.manifest import Stamp

INDEXES: dict[Collection, str] = {"pairs": "index", "gallery": "gallery_index"}
_SAMPLE_STREAM = 0x70726F62  # of the queries that recall is measured on


class Miner:
    """Mines graphs from embeddings, with an index service for each collection; a context manager.

    The services start with the first round and serve all later ones. gate: of the training that
    they run beside. Shards on GPUs die when it closes, and start anew with the next round or try.
    """

    def __init__(
        self,
        graphs: RunGraphs,
        mining: MiningConfig,
        reporter: Reporter,
        *,
        seed: int,
        ray: RayConfig,
        gate: PlacementGate | None = None,
        regions_of: Callable[[Ints], NDArray[np.str_] | None] | None = None,
    ) -> None:
        self._graphs = graphs
        self._mining = mining
        self._reporter = reporter
        self._seed = seed
        self._ray = ray
        self._services: dict[Collection, IndexService] = {}
        self._stack = ExitStack()
        self._closed = False
        self._gate = gate
        self._regions_of = regions_of
        self._num_releases = 0  # of the gate, when the services started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._stack.close()

    def mine(
        self, epoch: int, embeddings: str, stamp: Stamp, share: Ints | None = None
    ) -> Iterator[Record]:
        """Publish an epoch's graphs that are not published yet; yield the record of each graph.

        share: ids, ascending, of the places whose neighbors are found among each other; the others
        have those of the graph before. None: all places.
        """
        for collection in self._graphs.collections:
            if not self._graphs.is_there(epoch, collection, stamp):
                self._mine(collection, epoch, embeddings, stamp, share)
            yield self._graphs.round_record(epoch, collection)

    def _mine(
        self,
        collection: Collection,
        epoch: int,
        embeddings: str,
        stamp: Stamp,
        share: Ints | None,
    ) -> None:
        graphs = self._graphs
        query_ids = graphs.query_ids(share)
        ids, places = graphs.references(collection, share)
        embedded = _find_embedded(embeddings, stamp, ids)  # bad images are left out
        ids = ids[embedded]
        places = places[embedded]
        k = min(graphs.width(collection), len(np.unique(places)))
        with self._reporter.stage(f"indexing {collection}", "index shards"):
            search, info, service = self._open_search(
                collection, epoch, embeddings, query_ids, ids, k, stamp
            )
        # a resumed run must not choose another engine: last bits differ
        graphs.folder.update(exact_engine=info["engine"])
        previous = graphs.newest_before(epoch, collection)
        previous_uri = None if previous is None else graphs.uri(previous, collection)
        with self._reporter.stage(f"mining {collection}", "the first queries") as update:
            found = mine(
                search,
                epoch,
                embeddings,
                graphs.uri(epoch, collection),
                cfg=self.config_for(collection),
                k=k,
                query_ids=query_ids,
                reference_ids=ids,
                reference_places=places,
                exclusions=graphs.split.exclusions,
                stamp=stamp,
                previous=previous_uri,
                info={**info, "age": epoch - (previous or 0)},
                on_progress=update,
                carry_from=None if share is None else previous_uri,
                scores_positives=collection == "pairs" and graphs.sampling.hard_positives > 0,
            )
        effort = "" if service is None else service.effort_taken(epoch).describe()
        self._log_summary(collection, found, effort)

    def _open_search(
        self,
        collection: Collection,
        epoch: int,
        embeddings: str,
        query_ids: Ints,
        ids: Ints,
        k: int,
        stamp: Stamp,
    ) -> tuple[Searcher | CellSearch, Record, IndexService | None]:
        """Return a search among the references ids[R], what to record of it, and its service.

        Builds an index where mining.scope is global and the epoch has none yet.
        """
        cfg = self._mining
        if cfg.scope == "cells":
            places = self._graphs.places(collection)
            engine = self._graphs.folder.info.get("exact_engine")
            search = make_cell_search(cfg, places, stamp.dim, (self._seed, epoch), engine)
            return search, describe_cells(search, len(ids)), None
        # shards may hold a version of all references while one of a share is built
        all_ids, _ = self._graphs.references(collection)
        service = self.service_for(collection, len(all_ids), stamp.dim)
        # there already after an interrupted round
        index = service.report(epoch, stamp=stamp, ids=ids)
        if index is None:
            rng = np.random.default_rng((self._seed, epoch, _SAMPLE_STREAM))
            chosen, sample = sample_queries(embeddings, query_ids, cfg.recall_sample, rng)
            regions = self._regions_of(chosen) if self._regions_of else None
            index = service.build(
                epoch, embeddings, ids, sample=sample, regions=regions, k=k, stamp=stamp
            )
            self._reporter.record_line(f"           index: {index.describe()} ({index.reason})")
        return service.client, index.summary(), service

    def config_for(self, collection: Collection) -> MiningConfig:
        """Return how a collection is mined.

        The gallery holds no query's own reference, so no margin to it can be asked for there.
        """
        if collection == "pairs":
            return self._mining
        return self._mining.model_copy(update={"relative_margin": None})

    def service_for(self, collection: Collection, num_vectors: int, dim: int) -> IndexService:
        """Return the service of a collection, started where it is needed first, or again.

        num_vectors, dim: its references, for which shards are planned. Starts new shards in place
        of a service that has lost one, and asks an autoscaler for nodes that are gone. Raises
        RunError when the shards do not start, or workers were placed meanwhile.
        """
        self._await_gate()
        if collection in self._services and not self._services[collection].is_alive():
            self._services.pop(collection).stop()
        if collection not in self._services:
            folder = self._graphs.folder
            uri = folder.path(INDEXES[collection])
            await_nodes(self._mining, uri, self._ray, self._reporter, tick=self._check_closed)
            missing = [name for name in self._graphs.collections if name not in self._services]
            service = IndexService(
                self._mining,
                uri,
                num_vectors=num_vectors,
                dim=dim,
                num_queries=len(self._graphs.split.query_ids),
                engine=folder.info.get("exact_engine"),
                num_indexes=len(missing),
                start_timeout_s=self._ray.start_timeout_s,
            )
            self._services[collection] = self._stack.enter_context(service)
            if self._closed:  # while the shards started
                self._stack.close()
            self._check_closed()
            self._admit(service)
        return self._services[collection]

    def _await_gate(self) -> None:
        """Wait until workers are placed; forget the shards on GPUs that made room for them."""
        if self._gate is None:
            return
        num_releases = self._gate.wait_until_open(self._check_closed)
        if self._mining.gpus_per_shard and num_releases != self._num_releases:
            self._services.clear()
            self._stack.close()
        self._num_releases = num_releases

    def _admit(self, service: IndexService) -> None:
        """Have shards on GPUs make room when the gate closes. Raises RunError if it has closed."""
        if self._gate is None or not self._mining.gpus_per_shard:
            return
        if not self._gate.admit(service.client.shards, self._num_releases):
            raise RunError("workers were placed anew while the index shards started")

    def _check_closed(self) -> None:
        if self._closed:
            raise RunError("the index shards are stopped: the run ends")

    def _log_summary(self, collection: Collection, found: MiningReport, effort: str) -> None:
        above = ""
        if collection == "pairs":
            above = f", {found.above_positive:.0%} score above the positive"
        self._reporter.record_line(
            f"           mined {count_noun(found.neighbors, 'neighbor')} of"
            f" {count_noun(found.places, 'place')} among"
            f" {collection} ({found.coverage:.0%} of those wanted),"
            f" {found.overlap or 0:.0%} as before{above}{effort}"
        )
        if found.warning is not None:
            self._reporter.line(f"           {found.warning}")


def _find_embedded(embeddings: str, stamp: Stamp, ids: Ints) -> Bools:
    """Return whether a table holds each reference of ids[R], ascending; reads it part by part."""
    parts = open_embeddings(embeddings, "references", stamp=stamp).parts
    is_found = np.zeros(len(ids), dtype=bool)
    for head in read_heads((embeddings, part) for part in parts):
        rows = rows_of(ids, head.ids)
        is_found[rows[rows >= 0]] = True
    return is_found
