"""The neighbor graphs of a run: geographic at first, then mined; of places with pairs, and of the gallery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from s4g_ray import storage
from s4g_ray.checks import train_places
from s4g_ray.config import MiningConfig, RunConfig
from s4g_ray.dataset import GeoDataset
from s4g_ray.embedding_table import open_embeddings, read_embedding_part, read_heads
from s4g_ray.errors import RunError
from s4g_ray.exclusions import find_exclusions
from s4g_ray.gallery import GalleryReferences, gallery_references
from s4g_ray.index import IndexReport, IndexService
from s4g_ray.mining import mine
from s4g_ray.mining_plan import MiningReport
from s4g_ray.neighbors import write_geographic_graph, write_nearest_places
from s4g_ray.places import Exclusions, Places, check_radius
from s4g_ray.progress import Reporter
from s4g_ray.run_folder import Record, RunFolder

Ints = NDArray[np.int64]
Collection = Literal["pairs", "gallery"]
FOLDERS: dict[Collection, str] = {"pairs": "neighbors", "gallery": "gallery_neighbors"}
INDEXES: dict[Collection, str] = {"pairs": "index", "gallery": "gallery_index"}
GALLERY_POOL = 32  # gallery places mined for each place, at least
SAMPLED_PARTS = 16  # at least, that the sample for recall is drawn from, where there are so many
_SAMPLE_STREAM = 0x70726F62  # of the queries that recall is measured on


@dataclass(frozen=True)
class Graphs:
    """What a run's graphs are about, where they lie, and which epoch uses which."""

    config: RunConfig
    dataset: GeoDataset
    folder: RunFolder
    places: Places  # with pairs
    gallery: GalleryReferences | None
    exclusions: Exclusions | None

    @classmethod
    def of(cls, config: RunConfig, dataset: GeoDataset, folder: RunFolder) -> Self:
        """For a run on a data set. Raises InputError for a radius of exclusion that reaches too far."""
        places = train_places(config, dataset)
        gallery = gallery_references(config, dataset) if config.sampling.gallery_negatives else None
        everywhere = places if gallery is None else places.union(gallery.places)
        exclusions = find_exclusions(config, dataset, everywhere)
        if exclusions is not None:
            check_radius(everywhere, exclusions.radius_m)
        return cls(config, dataset, folder, places, gallery, exclusions)

    @property
    def collections(self) -> list[Collection]:
        """What neighbors are found among: the references of pairs, and the gallery where it serves."""
        return ["pairs"] if self.gallery is None else ["pairs", "gallery"]

    def uri(self, version: int, collection: Collection = "pairs") -> str:
        """Where the graph of a version is published."""
        return self.folder.path(f"{FOLDERS[collection]}/v={version:04d}")

    def newest_before(self, version: int, collection: Collection) -> int | None:
        """The newest graph that is there and older than a version."""
        return storage.latest_version(self.folder.path(FOLDERS[collection]), "v", at_most=version - 1)

    def is_there(self, epoch: int, collection: Collection, stamp: storage.Stamp | None) -> bool:
        """Whether an epoch's graph is there, mined from its checkpoint as `stamp` says (None: that is gone already)."""
        uri = self.uri(epoch, collection)
        return storage.is_published(uri) and stamp in (None, storage.open_published(uri, "neighbors").stamp)

    def round_record(self, epoch: int, collection: Collection) -> Record:
        """What the round found that mined an epoch's graph; published with the graph."""
        manifest = storage.open_published(self.uri(epoch, collection), "neighbors")
        record = {"collection": collection, **manifest.info["round"]}
        if collection == "gallery":  # where no query's own reference is
            return {k: v for k, v in record.items() if k != "above_positive" and not k.startswith("train_recall")}
        return record

    def write_geographic(self) -> None:
        """Publish the geographic graphs where they are not there yet."""
        info = {"source": "geographic", "dataset": self.dataset.fingerprint}
        if not storage.is_published(self.uri(0)):
            k = self.config.sampling.neighbor_pool_size
            write_geographic_graph(self.uri(0), self.places, k, self.exclusions, info=info)
        if self.gallery is not None and not storage.is_published(self.uri(0, "gallery")):
            sets, k = (self.places, self.gallery.places), self.width("gallery")
            write_nearest_places(self.uri(0, "gallery"), *sets, k, self.exclusions, info=info)

    def width(self, collection: Collection) -> int:
        """Neighbors of a place: the pool that negatives are drawn from."""
        cfg = self.config.sampling
        if collection == "pairs" or self.gallery is None:
            return cfg.neighbor_pool_size
        wanted = max(GALLERY_POOL, 4 * cfg.gallery_negatives // self.config.train.batch_size)
        return min(wanted, len(self.gallery.places))

    def mining_of(self, collection: Collection) -> MiningConfig:
        """How neighbors are mined. A query's own reference is not in the gallery, so there is no margin to it there."""
        cfg = self.config.mining
        return cfg if collection == "pairs" else cfg.model_copy(update={"relative_margin": None})

    def references(self, collection: Collection) -> tuple[Ints, Ints]:
        """ids[R], ascending, and place_ids[R] of the references that neighbors are found among."""
        if collection == "gallery" and self.gallery is not None:
            order = np.argsort(self.gallery.ids)
            return self.gallery.ids[order], self.gallery.place_ids[order]
        ids, places = self.dataset.columns("references", [self.config.data.train_split], ["id", "place_id"])
        paired = self.places.rows(places) >= 0
        return ids[paired], places[paired]


class Miner:
    """Mines graphs from embeddings, with an index service for each collection; a context manager."""

    def __init__(self, graphs: Graphs, reporter: Reporter) -> None:
        self._graphs, self._reporter = graphs, reporter
        self._services: dict[Collection, IndexService] = {}
        self._stack = ExitStack()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._stack.close()

    def mine(self, epoch: int, embeddings: str, stamp: storage.Stamp) -> Iterator[Record]:
        """Index an epoch's embeddings and publish its graphs where they are not there; yields the record of each."""
        for collection in self._graphs.collections:
            if not self._graphs.is_there(epoch, collection, stamp):
                self._mine(collection, epoch, embeddings, stamp)
            yield self._graphs.round_record(epoch, collection)

    def _mine(self, collection: Collection, epoch: int, embeddings: str, stamp: storage.Stamp) -> None:
        graphs, config = self._graphs, self._graphs.config
        ids, places = graphs.references(collection)
        embedded = np.isin(ids, _embedded_ids(embeddings, stamp))  # bad images are not
        ids, places = ids[embedded], places[embedded]
        (queries,) = graphs.dataset.columns("queries", [config.data.train_split], ["id"])
        service = self._service(collection)
        k, previous = min(graphs.width(collection), len(np.unique(places))), graphs.newest_before(epoch, collection)
        rng = np.random.default_rng((config.seed, epoch, _SAMPLE_STREAM))
        sample = sample_queries(embeddings, queries, config.mining.recall_sample, rng)
        index = service.report(epoch, stamp=stamp) or service.build(  # there already: of a round that was cut off
            epoch, embeddings, ids, sample=sample, k=k, stamp=stamp
        )
        graphs.folder.update(exact_engine=index.engine)  # a resumed run must not choose another: last bits differ
        with self._reporter.stage(f"mining {collection}") as update:
            found = mine(
                service.client, epoch, embeddings, graphs.uri(epoch, collection), cfg=graphs.mining_of(collection), k=k,
                query_ids=queries, reference_ids=ids, reference_places=places, exclusions=graphs.exclusions,
                stamp=stamp, previous=graphs.uri(previous, collection) if previous is not None else None,
                info={**describe_index(index), "age": epoch - (previous or 0)}, on_progress=update,
            )  # fmt: skip
        self._say(collection, found)

    def _service(self, collection: Collection) -> IndexService:
        if collection not in self._services:
            folder = self._graphs.folder
            service = IndexService(
                self._graphs.config.mining, folder.path(INDEXES[collection]), engine=folder.info.get("exact_engine"),
                start_timeout_s=self._graphs.config.ray.start_timeout_s,
            )  # fmt: skip
            self._services[collection] = self._stack.enter_context(service)
            if self._closed:  # while they started
                self._stack.close()
                raise RunError("the index shards are stopped: the run ends")
        return self._services[collection]

    def _say(self, collection: Collection, found: MiningReport) -> None:
        above = f", {found.above_positive:.0%} score above the positive" if collection == "pairs" else ""
        self._reporter.line(
            f"           mined {found.neighbors} neighbors of {found.places} places among {collection}"
            f" ({found.coverage:.0%} of those wanted), {found.overlap or 0:.0%} as before{above}"
        )


def describe_index(index: IndexReport) -> Record:
    """What a graph's manifest keeps of the index that it was mined with."""
    return {
        "index": index.kind, "references": index.num_vectors, "shards": index.num_shards, "index_gb": index.memory_gb,
        "recall": index.recall, "effort": index.effort, "engine": index.engine,
        "index_s": index.read_s + index.build_s + index.probe_s,
    }  # fmt: skip


def _embedded_ids(embeddings: str, stamp: storage.Stamp) -> Ints:
    """The ids of a table's references, without their vectors."""
    parts = open_embeddings(embeddings, "references", stamp=stamp).parts
    return np.concatenate([head.ids for head in read_heads((embeddings, part) for part in parts)])


def sample_queries(embeddings: str, ids: Ints, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Vectors of about `count` of some queries, from a few parts that are drawn at random: [n, D]."""
    parts = open_embeddings(embeddings, "queries").parts
    share = max(1, -(-count // min(len(parts), SAMPLED_PARTS)))
    found: list[NDArray[np.float32]] = []
    for number in rng.permutation(len(parts)):
        table = read_embedding_part(embeddings, parts[number])
        rows = np.flatnonzero(np.isin(table.ids, ids))
        found.append(table.vectors[np.sort(rng.permutation(rows)[:share])])
        if sum(map(len, found)) >= count:
            break
    return np.concatenate(found)[:count]
