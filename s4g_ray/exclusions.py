"""False negatives: pairs of places that show the same ground, and so must never share a batch."""

from __future__ import annotations

import numpy as np

from s4g_ray.checks import Places
from s4g_ray.config import RunConfig
from s4g_ray.dataset import GeoDataset
from s4g_ray.neighbors import PlacePairs, places_within


def find_exclusions(config: RunConfig, dataset: GeoDataset, places: Places) -> PlacePairs | None:
    """The pairs of train places that the strict protocol never uses as negatives; None when there are none.

    Those are a place and the semi-positives of any of its queries (VIGOR), and places that lie within
    `sampling.exclude_radius_m` of each other. The paper's protocol knows none.
    """
    if config.protocol == "paper":
        return None
    split = config.data.train_split
    found = [semi_positive_pairs(dataset, split)]
    if config.sampling.exclude_radius_m > 0:
        known = np.isfinite(places.lat) & np.isfinite(places.lon)
        lat, lon = places.lat[known], places.lon[known]
        found.append(places_within(places.ids[known], lat, lon, config.sampling.exclude_radius_m))
    both = PlacePairs.of(
        np.concatenate([pairs.first for pairs in found]), np.concatenate([pairs.second for pairs in found])
    )
    return both if len(both) else None


def semi_positive_pairs(dataset: GeoDataset, split: str) -> PlacePairs:
    """Each query's place with its semi-positive places."""
    semi = dataset.semi_positives(split)
    if not semi:
        return PlacePairs.of(np.zeros(0, np.int64), np.zeros(0, np.int64))
    table = dataset.table("queries", [split])
    own = table.place_ids[table.rows(np.fromiter(semi, np.int64, len(semi)))]
    counts = [len(places) for places in semi.values()]
    return PlacePairs.of(np.repeat(own, counts), np.concatenate(list(semi.values())))
