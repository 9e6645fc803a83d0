"""Index and mine each collection of references."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Self

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.data.tables.embedding_table import open_embeddings, read_heads, sample_queries
from s4g_ray.errors import RunError
from s4g_ray.index.sharded.service import IndexService
from s4g_ray.mining.mining_job import mine
from s4g_ray.mining.report import MiningReport
from s4g_ray.pipeline.rounds.graphs import Collection, RunGraphs
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.progress import Reporter
from s4g_ray.storage.manifest import Stamp

INDEXES: dict[Collection, str] = {"pairs": "index", "gallery": "gallery_index"}
_SAMPLE_STREAM = 0x70726F62  # of the queries that recall is measured on


class Miner:
    """Mines graphs from embeddings, with an index service for each collection; a context manager."""

    def __init__(self, graphs: RunGraphs, reporter: Reporter) -> None:
        self._graphs, self._reporter = graphs, reporter
        self._services: dict[Collection, IndexService] = {}
        self._stack = ExitStack()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._stack.close()

    def mine(self, epoch: int, embeddings: str, stamp: Stamp) -> Iterator[Record]:
        """Index an epoch's embeddings and publish its graphs where they are not there; yields the record of each."""
        for collection in self._graphs.collections:
            if not self._graphs.is_there(epoch, collection, stamp):
                self._mine(collection, epoch, embeddings, stamp)
            yield self._graphs.round_record(epoch, collection)

    def _mine(self, collection: Collection, epoch: int, embeddings: str, stamp: Stamp) -> None:
        graphs, config = self._graphs, self._graphs.config
        ids, places = graphs.references(collection)
        embedded = np.isin(ids, _embedded_ids(embeddings, stamp))  # bad images are not
        ids, places = ids[embedded], places[embedded]
        (queries,) = graphs.dataset.columns("queries", [config.data.train_split], ["id"])
        service = self._service(collection)
        k, previous = (
            min(graphs.width(collection), len(np.unique(places))),
            graphs.newest_before(epoch, collection),
        )
        rng = np.random.default_rng((config.seed, epoch, _SAMPLE_STREAM))
        sample = sample_queries(embeddings, queries, config.mining.recall_sample, rng)
        index = service.report(
            epoch, stamp=stamp
        ) or service.build(  # there already: of a round that was cut off
            epoch, embeddings, ids, sample=sample, k=k, stamp=stamp
        )
        graphs.folder.update(
            exact_engine=index.engine
        )  # a resumed run must not choose another: last bits differ
        with self._reporter.stage(f"mining {collection}") as update:
            found = mine(
                service.client,
                epoch,
                embeddings,
                graphs.uri(epoch, collection),
                cfg=graphs.mining_of(collection),
                k=k,
                query_ids=queries,
                reference_ids=ids,
                reference_places=places,
                exclusions=graphs.exclusions,
                stamp=stamp,
                previous=graphs.uri(previous, collection) if previous is not None else None,
                info={**index.summary(), "age": epoch - (previous or 0)},
                on_progress=update,
            )
        self._log_summary(collection, found)

    def _service(self, collection: Collection) -> IndexService:
        if collection not in self._services:
            folder = self._graphs.folder
            service = IndexService(
                self._graphs.config.mining,
                folder.path(INDEXES[collection]),
                engine=folder.info.get("exact_engine"),
                start_timeout_s=self._graphs.config.ray.start_timeout_s,
            )
            self._services[collection] = self._stack.enter_context(service)
            if self._closed:  # while they started
                self._stack.close()
                raise RunError("the index shards are stopped: the run ends")
        return self._services[collection]

    def _log_summary(self, collection: Collection, found: MiningReport) -> None:
        above = (
            f", {found.above_positive:.0%} score above the positive"
            if collection == "pairs"
            else ""
        )
        self._reporter.line(
            f"           mined {found.neighbors} neighbors of {found.places} places among {collection}"
            f" ({found.coverage:.0%} of those wanted), {found.overlap or 0:.0%} as before{above}"
        )


def _embedded_ids(embeddings: str, stamp: Stamp) -> Ints:
    """The ids of a table's references, without their vectors."""
    parts = open_embeddings(embeddings, "references", stamp=stamp).parts
    return np.concatenate([head.ids for head in read_heads((embeddings, part) for part in parts)])
