"""TrainSplit: pairs, places, exclusions and gallery of a run, read once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.places import Places


def find_exclusions(config: RunConfig, dataset: GeoDataset, places: Places) -> Exclusions | None:
    """What the strict protocol never uses as negatives; None when there is nothing.

    Those are a place and the semi-positives of any of its queries (VIGOR), and places that lie within
    `sampling.exclude_radius_m` of each other. The paper's protocol knows none.
    """
    if config.protocol == "paper":
        return None
    semi = semi_positive_pairs(dataset, config.data.train_split)
    radius = config.sampling.exclude_radius_m
    return Exclusions(places, semi, radius) if len(semi) or radius > 0 else None


def semi_positive_pairs(dataset: GeoDataset, split: str) -> PlacePairs:
    """Each query's place with its semi-positive places."""
    semi = dataset.semi_positives(split)
    if not semi:
        return PlacePairs.from_arrays(np.zeros(0, np.int64), np.zeros(0, np.int64))
    ids, places = dataset.columns("queries", [split], ["id", "place_id"])
    own = places[np.searchsorted(ids, np.fromiter(semi, np.int64, len(semi)))]
    counts = [len(places) for places in semi.values()]
    return PlacePairs.from_arrays(np.repeat(own, counts), np.concatenate(list(semi.values())))


def train_places(config: RunConfig, dataset: GeoDataset) -> Places:
    """The places of the train split that have a pair, where their first reference lies; no others can be in a batch."""
    split = config.data.train_split
    place_ids, lat, lon = dataset.columns("references", [split], ["place_id", "lat", "lon"])
    ids, first = np.unique(place_ids, return_index=True)
    first = first[np.isin(ids, dataset.pairs(split).place_ids)]
    return Places(place_ids[first], lat[first], lon[first])


@dataclass(frozen=True)
class GalleryReferences:
    """References whose place has no training pair: ids[R], place_ids[R], a place's own side by side.

    places: their places, where the first reference of each lies.
    """

    ids: Ints
    place_ids: Ints
    places: Places

    def __len__(self) -> int:
        return len(self.ids)


def gallery_references(config: RunConfig, dataset: GeoDataset) -> GalleryReferences:
    """The references of `sampling.gallery_splits` whose place has no training pair, by place and then by id."""
    names = ["id", "place_id", "lat", "lon"]
    ids, place_ids, lat, lon = dataset.columns("references", config.sampling.gallery_splits, names)
    paired = dataset.pairs(config.data.train_split).place_ids
    rows = np.flatnonzero(~np.isin(place_ids, paired))
    rows = rows[np.argsort(place_ids[rows], kind="stable")]
    places, first = np.unique(place_ids[rows], return_index=True)
    return GalleryReferences(
        ids[rows], place_ids[rows], Places(places, lat[rows[first]], lon[rows[first]])
    )
