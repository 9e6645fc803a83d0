"""RunGraphs: the neighbor graphs of a run, where they lie, and which of them exist.

Graphs are geographic at first (version 0), then mined. The collection `pairs` holds neighbors among
the places with pairs, `gallery` those among the gallery negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import MiningConfig, RunConfig, SamplingConfig
from s4g_ray.data.places import Places
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.pipeline.rounds.rotation import choose_places, round_number
from s4g_ray.pipeline.run_folder import Record, RunFolder
from s4g_ray.row_lookup import rows_of
from s4g_ray.sampling.geographic_neighbors import write_geographic_graph, write_nearest_places
from s4g_ray.storage.manifest import Stamp, is_published, latest_version, open_published

Collection = Literal["pairs", "gallery"]
FOLDERS: dict[Collection, str] = {"pairs": "neighbors", "gallery": "gallery_neighbors"}
GALLERY_POOL = 32  # gallery places mined for each place, at least


def gallery_width(sampling: SamplingConfig, batch_size: int) -> int:
    """Return how many places of a gallery are mined for each place, where it has as many."""
    return max(GALLERY_POOL, 4 * sampling.gallery_negatives // batch_size)


@dataclass(frozen=True)
class RunGraphs:
    """The graphs of a run folder, about the places of its train split."""

    split: TrainSplit
    fingerprint: str  # of the data set
    folder: RunFolder
    sampling: SamplingConfig
    mining: MiningConfig
    batch_size: int
    seed: int

    @classmethod
    def from_config(
        cls, config: RunConfig, split: TrainSplit, fingerprint: str, folder: RunFolder
    ) -> Self:
        """Describe the graphs of a run on a train split of a data set with this fingerprint."""
        return cls(
            split,
            fingerprint,
            folder,
            config.sampling,
            config.mining,
            config.train.batch_size,
            config.seed,
        )

    @property
    def collections(self) -> list[Collection]:
        """The collections of references that neighbors are found among."""
        return ["pairs"] if self.split.gallery is None else ["pairs", "gallery"]

    def uri(self, version: int, collection: Collection = "pairs") -> str:
        """Return where the graph of a version is published."""
        return self.folder.path(f"{FOLDERS[collection]}/v={version:04d}")

    def newest_before(self, version: int, collection: Collection) -> int | None:
        """Return the newest published graph that is older than a version."""
        return latest_version(self.folder.path(FOLDERS[collection]), "v", at_most=version - 1)

    def share_of_round(self, epoch: int) -> Ints | None:
        """Return the ids, ascending, of the places that the round after an epoch takes.

        None: all of them. That is every round of mining.refresh=full, and of rotate the first one,
        and one without a mined graph whose other places could be carried on.
        """
        number = round_number(self.mining, epoch)
        if self.mining.refresh == "full" or number < 1:
            return None
        if not all(self.newest_before(epoch, collection) for collection in self.collections):
            return None
        share = choose_places(self.split.places, self.mining, number, seed=self.seed)
        if self.split.gallery is None:
            return share
        # by itself: a share of both together may hold no train place
        gallery = choose_places(self.split.gallery.places, self.mining, number, seed=self.seed)
        return np.union1d(share, gallery)

    def is_there(self, epoch: int, collection: Collection, stamp: Stamp | None) -> bool:
        """Whether an epoch's graph is published, with this stamp of its checkpoint.

        stamp: None where the checkpoint is removed already; then any stamp does.
        """
        uri = self.uri(epoch, collection)
        return is_published(uri) and stamp in (None, open_published(uri, "neighbors").stamp)

    def round_record(self, epoch: int, collection: Collection) -> Record:
        """Read what the round found that mined an epoch's graph; it is published with the graph."""
        manifest = open_published(self.uri(epoch, collection), "neighbors")
        record = {"collection": collection, **manifest.info["round"]}
        if collection == "pairs":
            return record
        # these are about a query's own reference, which is not in the gallery
        return {
            key: value
            for key, value in record.items()
            if key != "above_positive" and not key.startswith("train_recall")
        }

    def write_geographic(self) -> None:
        """Publish the geographic graphs that are not published yet."""
        split = self.split
        info = {"source": "geographic", "dataset": self.fingerprint}
        if not is_published(self.uri(0)):
            k = self.sampling.neighbor_pool_size
            write_geographic_graph(self.uri(0), split.places, k, split.exclusions, info=info)
        if split.gallery is not None and not is_published(self.uri(0, "gallery")):
            write_nearest_places(
                self.uri(0, "gallery"),
                split.places,
                split.gallery.places,
                self.width("gallery"),
                split.exclusions,
                info=info,
            )

    def width(self, collection: Collection) -> int:
        """Return the neighbors of a place: the size of the pool that negatives are drawn from."""
        if collection == "pairs" or self.split.gallery is None:
            return self.sampling.neighbor_pool_size
        wanted = gallery_width(self.sampling, self.batch_size)
        return min(wanted, len(self.split.gallery.places))

    def places(self, collection: Collection) -> Places:
        """Return the places of the queries and of a collection's references."""
        if collection == "gallery" and self.split.gallery is not None:
            return self.split.places.union(self.split.gallery.places)
        return self.split.places

    def references(self, collection: Collection, share: Ints | None = None) -> tuple[Ints, Ints]:
        """Return ids[R], ascending, and place_ids[R] of the references of a collection.

        share: ids, ascending, of the places whose references are wanted; None: of all.
        """
        split = self.split
        if collection == "gallery" and split.gallery is not None:
            order = np.argsort(split.gallery.ids)
            ids, places = split.gallery.ids[order], split.gallery.place_ids[order]
        else:
            ids, places = split.reference_ids, split.reference_places
        if share is None:
            return ids, places
        is_chosen = rows_of(share, places) >= 0
        return ids[is_chosen], places[is_chosen]

    def query_ids(self, share: Ints | None = None) -> Ints:
        """Return the ids of the train queries, ascending; share: of these places alone."""
        if share is None:
            return self.split.query_ids
        pairs = self.split.pairs
        return np.unique(pairs.query_ids[rows_of(share, pairs.place_ids) >= 0])
