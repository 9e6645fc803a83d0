"""The neighbor graphs of a run: geographic at first, then mined; of places with pairs, and of the gallery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import MiningConfig, RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.exclusions import Exclusions, check_radius
from s4g_ray.data.places import Places
from s4g_ray.data.train_split import (
    GalleryReferences,
    find_exclusions,
    gallery_references,
    train_places,
)
from s4g_ray.pipeline.run_folder import Record, RunFolder
from s4g_ray.sampling.geographic_neighbors import write_geographic_graph, write_nearest_places
from s4g_ray.storage.manifest import Stamp, is_published, latest_version, open_published

Collection = Literal["pairs", "gallery"]
FOLDERS: dict[Collection, str] = {"pairs": "neighbors", "gallery": "gallery_neighbors"}
GALLERY_POOL = 32  # gallery places mined for each place, at least


@dataclass(frozen=True)
class RunGraphs:
    """What a run's graphs are about, where they lie, and which epoch uses which."""

    config: RunConfig
    dataset: GeoDataset
    folder: RunFolder
    places: Places  # with pairs
    gallery: GalleryReferences | None
    exclusions: Exclusions | None

    @classmethod
    def from_config(cls, config: RunConfig, dataset: GeoDataset, folder: RunFolder) -> Self:
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
        return latest_version(self.folder.path(FOLDERS[collection]), "v", at_most=version - 1)

    def is_there(self, epoch: int, collection: Collection, stamp: Stamp | None) -> bool:
        """Whether an epoch's graph is there, mined from its checkpoint as `stamp` says (None: that is gone already)."""
        uri = self.uri(epoch, collection)
        return is_published(uri) and stamp in (None, open_published(uri, "neighbors").stamp)

    def round_record(self, epoch: int, collection: Collection) -> Record:
        """What the round found that mined an epoch's graph; published with the graph."""
        manifest = open_published(self.uri(epoch, collection), "neighbors")
        record = {"collection": collection, **manifest.info["round"]}
        if collection == "gallery":  # where no query's own reference is
            return {
                k: v
                for k, v in record.items()
                if k != "above_positive" and not k.startswith("train_recall")
            }
        return record

    def write_geographic(self) -> None:
        """Publish the geographic graphs where they are not there yet."""
        info = {"source": "geographic", "dataset": self.dataset.fingerprint}
        if not is_published(self.uri(0)):
            k = self.config.sampling.neighbor_pool_size
            write_geographic_graph(self.uri(0), self.places, k, self.exclusions, info=info)
        if self.gallery is not None and not is_published(self.uri(0, "gallery")):
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
        ids, places = self.dataset.columns(
            "references", [self.config.data.train_split], ["id", "place_id"]
        )
        paired = self.places.rows(places) >= 0
        return ids[paired], places[paired]
