"""What is refused before a run starts: what the data set or the cluster cannot give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from s4g_ray.config.schema import MiningConfig, RunConfig, TrainConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.exclusions import check_radius
from s4g_ray.data.places import Places
from s4g_ray.data.schema import gallery_splits
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.distributed.placement import Need, Node, actor_need, check_room, shard_need
from s4g_ray.encoder.embedding_job import LOADER_CPUS
from s4g_ray.errors import InputError
from s4g_ray.index.recall import plan_for
from s4g_ray.mining.groups import SEARCHER_CPUS
from s4g_ray.sampling.cell_tasks import PLANNER_CPUS


def check_against_dataset(config: RunConfig, dataset: GeoDataset, split: TrainSplit) -> None:
    """Raise InputError, with a line a fault, where a data set cannot give what is configured."""
    check_test_split(config, dataset)
    if config.data.val_split is not None:
        check_scored(config, dataset, "val_split", config.data.val_split)
    check_headings(config, dataset, config.data.train_split)
    places = split.places
    faults = []
    if len(places.ids) < config.train.batch_size:
        faults.append(
            f"train.batch_size={config.train.batch_size} exceeds the {len(places.ids)} places with pairs of split"
            f" {config.data.train_split!r} in {dataset.uri}; lower it: no place stands twice in a batch"
        )
    if config.sampling.mode != "random":
        faults += _sampling_faults(config, places)
    faults += _gallery_faults(config, dataset, split)
    if faults:
        raise InputError("\n".join(faults))
    if split.exclusions is not None:
        check_radius(split.exclusions.places, split.exclusions.radius_m)


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


def _gallery_faults(config: RunConfig, dataset: GeoDataset, split: TrainSplit) -> list[str]:
    wanted = config.sampling.gallery_negatives
    splits = config.sampling.gallery_splits
    found = split.gallery
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
    check_scored(config, dataset, "test_split", config.data.test_split)


def check_scored(config: RunConfig, dataset: GeoDataset, key: str, split: str) -> None:
    """Raises InputError when a split, which a key of `data` names, cannot be evaluated."""
    tested = dataset.table("queries", [split]).place_ids
    gallery = dataset.table("references", gallery_splits(split)).place_ids
    if not np.isin(tested, gallery).any():
        raise InputError(
            f"data.{key}={split!r} holds no query whose place has a reference in {dataset.uri}:"
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


def check_resources(
    config: RunConfig, nodes: Sequence[Node], *, training: bool = True, num_pairs: int | None = None
) -> None:
    """Raises InputError when what lives at the same time, in training or when embedding alone, finds no room.

    num_pairs: so few that one pass plans them need no tasks for it; None: unknown.
    """
    cells = training and (num_pairs is None or num_pairs > config.sampling.max_pairs_per_cell)
    check_room(*_needs_of(config, training, cells, _workers_at_once(config.train, nodes)), nodes)


def _workers_at_once(train: TrainConfig, nodes: Sequence[Node]) -> int:
    """Of an elastic range, how many Ray Train starts: it looks at what nodes have, not at who else is on them."""
    least, most = train.workers
    kinds = [(train.cpus_per_worker, "cpus"), *[(train.gpus, "gpus")] * train.use_gpu]
    room = sum(min(int(getattr(node, name) // each) for each, name in kinds) for node in nodes)
    return max(least, min(most, room))


def _needs_of(
    config: RunConfig, training: bool, cells: bool, workers: int
) -> tuple[list[Need], list[list[Need]]]:
    """What holds its resources all the time, and the tasks that each phase adds.

    Workers (of an elastic range as many as would start) hold them through a round, and embedding actors and the
    indexes between rounds. The tasks that search run when the embedding is over, and those that plan after these, or
    beside them where rounds overlap with training. What a worker's loader takes is the worker's.
    """
    train, embedding, mining = config.train, config.embedding, config.mining
    mines = training and config.sampling.mode == "similarity"
    always = []
    if training:
        always.append(
            Need(
                workers, "worker", train.cpus_per_worker, train.gpus, train.label_selector, "train"
            )
        )
    if mines:
        num_shards = mining.num_shards * (
            2 if config.sampling.gallery_negatives else 1
        )  # the gallery has an index too
        always.append(shard_need(mining, num_shards))
    always.append(actor_need(embedding))
    loading = Need(1, "loading task", LOADER_CPUS)
    rounds = [loading, *[Need(mining.num_searchers, "searching task", SEARCHER_CPUS)] * mines]
    planning = (
        [Need(1, "planning task", PLANNER_CPUS)]
        if cells and config.sampling.mode != "random"
        else []
    )
    if mining.schedule == "overlap":
        return always, [[task, *planning] for task in rounds]
    return always, [[task] for task in [*rounds, *planning]]


def check_index(cfg: MiningConfig, num_references: int, dim: int) -> None:
    """Raise InputError when references cannot be indexed as section `mining` asks.

    A round would fail on it, epochs after the start.
    """
    if num_references < cfg.num_shards:
        raise InputError(
            f"mining.num_shards={cfg.num_shards} exceeds the {num_references} references to index; lower it"
        )
    try:
        plan_for(cfg, num_references, dim)
    except ValueError as error:
        raise InputError(str(error)) from error
