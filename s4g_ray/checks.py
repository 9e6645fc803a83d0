"""What is refused before a run starts: what the data set or the cluster cannot give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from s4g_ray.config import RunConfig
from s4g_ray.dataset import GeoDataset, gallery_splits
from s4g_ray.embedding import LOADER_CPUS
from s4g_ray.errors import InputError


def check_against_dataset(config: RunConfig, dataset: GeoDataset) -> None:
    """Raises InputError for what a configuration asks and a data set cannot give: a line for each fault."""
    check_test_split(config, dataset)
    check_headings(config, dataset, config.data.train_split)
    places, faults = train_places(config, dataset), []
    if len(places.ids) < config.train.batch_size:
        faults.append(
            f"train.batch_size={config.train.batch_size} exceeds the {len(places.ids)} places with pairs of split"
            f" {config.data.train_split!r} in {dataset.uri}; lower it: no place stands twice in a batch"
        )
    if config.sampling.mode != "random":
        faults += _sampling_faults(config, places)
    if faults:
        raise InputError("\n".join(faults))


def _sampling_faults(config: RunConfig, places: Places) -> list[str]:
    faults = []
    if config.sampling.neighbor_pool_size > len(places.ids) - 1:
        faults.append(
            f"sampling.neighbor_pool_size={config.sampling.neighbor_pool_size} is too large for the"
            f" {len(places.ids)} places of the train split; at most {len(places.ids) - 1} is possible"
        )
    unknown = int(np.isnan(places.lat).sum())
    if unknown:
        faults.append(
            f"sampling.mode={config.sampling.mode} starts from geographic neighbors, but {unknown} train places"
            " have no lat and lon; add them, or use sampling.mode=random"
        )
    return faults


def check_test_split(config: RunConfig, dataset: GeoDataset) -> None:
    """Raises InputError when the test split cannot be evaluated."""
    split = config.data.test_split
    tested = dataset.table("queries", [split]).place_ids
    gallery = dataset.table("references", gallery_splits(split)).place_ids
    if not np.isin(tested, gallery).any():
        raise InputError(
            f"data.test_split={split!r} holds no query whose place has a reference in {dataset.uri}:"
            f" {len(tested)} queries, {len(gallery)} references"
        )
    check_headings(config, dataset, split)


def check_headings(config: RunConfig, dataset: GeoDataset, split: str) -> None:
    """Raises InputError when headings are to be used and some queries of a split have none."""
    if config.data.query_heading != "known":
        return
    headings = dataset.table("queries", [split]).headings
    if not np.isfinite(headings).all():
        raise InputError(
            f"data.query_heading=known, but {int((~np.isfinite(headings)).sum())} of {len(headings)} {split} queries"
            " have no heading_deg; add it, or set data.query_heading=as_is (what is no panorama is never turned)"
        )


def check_resources(config: RunConfig, cluster: Mapping[str, float], *, training: bool = True) -> None:
    """Raises InputError when embedding actors, and workers when training, need more than the cluster has.

    They live side by side: training waits for a mining round and holds its resources meanwhile.
    """
    train, embedding = config.train, config.embedding
    num_workers = train.num_workers if training else 0
    wanted = {
        "CPU": (num_workers, train.cpus_per_worker, embedding.num_actors, embedding.cpus_per_actor, LOADER_CPUS),
        "GPU": (num_workers, train.gpus, embedding.num_actors, embedding.gpus_per_actor, 0.0),
    }
    for name, (workers, each, actors, each_actor, loading) in wanted.items():
        total = workers * each + actors * each_actor + loading
        if total > cluster.get(name, 0.0) + 1e-9:
            remedy = {
                "CPU": "lower num_workers, num_actors or what each takes, or raise ray.num_cpus",
                "GPU": "to do without, set train.use_gpu=false train.precision=auto embedding.gpus_per_actor=0",
            }[name]
            parts = [f"{workers} workers x {each:g}"] if training else []
            parts += [f"{actors} embedding actors x {each_actor:g}", *([f"{loading:g} for loading"] if loading else [])]
            raise InputError(
                f"{total:g} {name}s are needed ({' + '.join(parts)}), but the cluster has {cluster.get(name, 0.0):g};"
                f" {remedy}"
            )


@dataclass(frozen=True)
class Places:
    """ids[P] and coordinates of places: those of the first reference."""

    ids: NDArray[np.int64]
    lat: NDArray[np.float64]
    lon: NDArray[np.float64]


def train_places(config: RunConfig, dataset: GeoDataset) -> Places:
    """The places of the train split that have a pair: others can be in no batch, so they are nobody's neighbors."""
    table = dataset.table("references", [config.data.train_split])
    table = table.take(np.flatnonzero(np.isin(table.place_ids, dataset.pairs(config.data.train_split).place_ids)))
    ids, first = np.unique(table.place_ids, return_index=True)
    return Places(ids, table.lat[first], table.lon[first])
