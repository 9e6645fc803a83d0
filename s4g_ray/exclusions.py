"""False negatives of a data set: places that show the same ground, and so must never share a batch."""

from __future__ import annotations

import numpy as np

from s4g_ray.config import RunConfig
from s4g_ray.dataset import GeoDataset
from s4g_ray.places import Exclusions, PlacePairs, Places


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
        return PlacePairs.of(np.zeros(0, np.int64), np.zeros(0, np.int64))
    ids, places = dataset.columns("queries", [split], ["id", "place_id"])
    own = places[np.searchsorted(ids, np.fromiter(semi, np.int64, len(semi)))]
    counts = [len(places) for places in semi.values()]
    return PlacePairs.of(np.repeat(own, counts), np.concatenate(list(semi.values())))
