"""TrainSplit: pairs, places, exclusions and gallery of a run, read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.pairs import PairTable, join_pairs, take_rows
from s4g_ray.data.places import Places
from s4g_ray.data.tables.view_columns import SemiPositives


@dataclass(frozen=True)
class GalleryReferences:
    """References whose place has no training pair: ids[R], place_ids[R], sorted by place.

    places: their places, each at the position of its first reference.
    """

    ids: Ints
    place_ids: Ints
    places: Places

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TrainSplit:
    """The train split of a run: what sampling, mining and the checks before a run need of it.

    places: those with a pair, each at the position of its first reference; no others join a batch.
    gallery: references without a pair that serve as negatives; None unless
    sampling.gallery_negatives asks for them. exclusions: places that are never negatives of each
    other; None where there are none. Arrays that are equal are one array, where a place has one
    query and one reference and their ids are in the order of the places: 48 bytes a place.
    """

    name: str
    query_ids: Ints  # ascending
    reference_ids: Ints  # of the references of `places`, ascending
    reference_places: Ints
    pairs: PairTable
    places: Places
    gallery: GalleryReferences | None
    exclusions: Exclusions | None

    @classmethod
    def read(cls, config: RunConfig, dataset: GeoDataset) -> Self:
        """Read the split that data.train_split names, as sections sampling and protocol use it."""
        split = config.data.train_split
        query_ids, query_places = dataset.columns("queries", [split], ["id", "place_id"])
        names = ["id", "place_id", "lat", "lon"]
        ids, place_ids, lat, lon = dataset.columns("references", [split], names)
        pairs = join_pairs(query_ids, query_places, ids, place_ids)
        paired = np.flatnonzero(np.isin(place_ids, pairs.place_ids))
        reference_places = take_rows(place_ids, paired)
        places = first_positions(reference_places, take_rows(lat, paired), take_rows(lon, paired))
        gallery = None
        everywhere = places
        if config.sampling.gallery_negatives:
            splits = config.sampling.gallery_splits
            gallery = read_gallery_references(dataset, splits, pairs.place_ids)
            everywhere = places.union(gallery.places)
        exclusions = find_exclusions(config, dataset, everywhere, query_ids, query_places)
        return cls(
            name=split,
            query_ids=query_ids,
            reference_ids=take_rows(ids, paired),
            reference_places=reference_places,
            pairs=pairs,
            places=places,
            gallery=gallery,
            exclusions=exclusions,
        )


def first_positions(place_ids: Ints, lat: Floats64, lon: Floats64) -> Places:
    """Return the distinct places of references[R], each where its first reference lies.

    Shares the arrays where the places ascend.
    """
    if (place_ids[1:] > place_ids[:-1]).all():
        return Places(place_ids, lat, lon)
    ids, first = np.unique(place_ids, return_index=True)
    return Places(ids, lat[first], lon[first])


def read_gallery_references(
    dataset: GeoDataset, splits: Sequence[str], paired_places: Ints
) -> GalleryReferences:
    """Read the references of some splits whose place has no pair, sorted by place, then by id."""
    names = ["id", "place_id", "lat", "lon"]
    ids, place_ids, lat, lon = dataset.columns("references", splits, names)
    rows = np.flatnonzero(~np.isin(place_ids, paired_places))
    rows = rows[np.argsort(place_ids[rows], kind="stable")]
    places = first_positions(place_ids[rows], lat[rows], lon[rows])
    return GalleryReferences(ids[rows], place_ids[rows], places)


def find_exclusions(
    config: RunConfig, dataset: GeoDataset, places: Places, query_ids: Ints, query_places: Ints
) -> Exclusions | None:
    """Find the places of a train split that are never negatives of each other; None without any.

    Those are a place and the semi-positives of any of its queries (VIGOR), and places within
    sampling.exclude_radius_m of each other. The paper's protocol excludes none.
    """
    if config.protocol == "paper":
        return None
    named = dataset.semi_positives(config.data.train_split)
    semi = pair_semi_positives(named, query_ids, query_places)
    radius_m = config.sampling.exclude_radius_m
    if len(semi) or radius_m > 0:
        return Exclusions(places, semi, radius_m)
    return None


def pair_semi_positives(semi: SemiPositives, query_ids: Ints, query_places: Ints) -> PlacePairs:
    """Pair the place of each query with its semi-positive places; query_ids ascend."""
    queries, places = semi.expand()
    return PlacePairs.from_arrays(query_places[np.searchsorted(query_ids, queries)], places)
