"""What is refused before a run starts: what the data set or the cluster cannot give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from s4g_ray.config import RunConfig
from s4g_ray.dataset import GeoDataset, gallery_splits
from s4g_ray.embedding import LOADER_CPUS
from s4g_ray.errors import InputError
from s4g_ray.gallery import gallery_references
from s4g_ray.index_effort import plan_for
from s4g_ray.mining_plan import SEARCHER_CPUS
from s4g_ray.places import Places
from s4g_ray.planning import PLANNER_CPUS


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
    faults += _gallery_faults(config, dataset)
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


def _gallery_faults(config: RunConfig, dataset: GeoDataset) -> list[str]:
    wanted, splits = config.sampling.gallery_negatives, config.sampling.gallery_splits
    found = gallery_references(config, dataset) if wanted else None
    if found is None or len(found.places) >= wanted:
        return []
    total = len(dataset.table("references", splits))
    remedy = "add references without a query to the train split, or lower it"
    if "gallery" not in splits and len(dataset.table("references", ["gallery"])):
        remedy = "set sampling.gallery_splits=[train, gallery], " + remedy
    return [
        f"sampling.gallery_negatives={wanted} exceeds the {len(found.places)} places without a training pair: of"
        f" {total} references of {' and '.join(splits)}, {total - len(found)} stand at places with pairs; {remedy}"
    ]


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

    They live side by side: training waits for a mining round and holds its resources meanwhile, and so do the
    indexes. The tasks that search them run when the embedding is over, and those that plan cells after these.
    """
    train, embedding, mining = config.train, config.embedding, config.mining
    mines = training and config.sampling.mode == "similarity"
    always = [_Need(train.num_workers, "workers", train.cpus_per_worker, train.gpus)] if training else []
    if mines:
        num_shards = mining.num_shards * (2 if config.sampling.gallery_negatives else 1)  # the gallery has an index too
        always.append(_Need(num_shards, "index shards", mining.cpus_per_shard, mining.gpus_per_shard))
    actors = _Need(embedding.num_actors, "embedding actors", embedding.cpus_per_actor, embedding.gpus_per_actor)
    phases = [[*always, actors, _Need(1, "loading task", LOADER_CPUS, 0.0)]]
    if mines:
        phases.append([*always, _Need(mining.num_searchers, "searching tasks", SEARCHER_CPUS, 0.0)])
    if training and config.sampling.mode != "random":
        phases.append([*always, _Need(1, "planning task", PLANNER_CPUS, 0.0)])
    for needs in phases:
        _check_resource("CPU", needs, cluster)
        _check_resource("GPU", needs, cluster)


@dataclass(frozen=True)
class _Need:
    """What actors or tasks of one kind take of a cluster, each."""

    count: int
    name: str
    cpus: float
    gpus: float


def _check_resource(kind: Literal["CPU", "GPU"], needs: Sequence[_Need], cluster: Mapping[str, float]) -> None:
    shares = [(need.count, need.name, need.cpus if kind == "CPU" else need.gpus) for need in needs]
    total, available = sum(count * each for count, _, each in shares), cluster.get(kind, 0.0)
    if total > available + 1e-9:
        remedy = {
            "CPU": "lower num_workers, num_actors, num_shards, num_searchers or what each takes, or raise ray.num_cpus",
            "GPU": "to do without, set train.use_gpu=false train.precision=auto embedding.gpus_per_actor=0"
            " mining.gpus_per_shard=0",
        }[kind]
        parts = " + ".join(f"{count} {name} x {each:g}" for count, name, each in shares if each)
        raise InputError(f"{total:g} {kind}s are needed ({parts}), but the cluster has {available:g}; {remedy}")


def check_index(config: RunConfig, num_references: int, dim: int) -> None:
    """Raises InputError when references cannot be indexed as `mining` asks: a round would fail after epochs."""
    cfg = config.mining
    if num_references < cfg.num_shards:
        raise InputError(
            f"mining.num_shards={cfg.num_shards} exceeds the {num_references} references to index; lower it"
        )
    try:
        plan_for(cfg, num_references, dim)
    except ValueError as error:
        raise InputError(str(error)) from error


def train_places(config: RunConfig, dataset: GeoDataset) -> Places:
    """The places of the train split that have a pair, where their first reference lies; no others can be in a batch."""
    split = config.data.train_split
    place_ids, lat, lon = dataset.columns("references", [split], ["place_id", "lat", "lon"])
    ids, first = np.unique(place_ids, return_index=True)
    first = first[np.isin(ids, dataset.pairs(split).place_ids)]
    return Places(place_ids[first], lat[first], lon[first])
