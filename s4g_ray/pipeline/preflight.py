"""Checks before a run starts: can the data set and the cluster give what is configured?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.config.schema import MiningConfig, RunConfig, share_rest
from s4g_ray.config.training_schema import TrainConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.exclusions import check_radius
from s4g_ray.data.format.header import CORRECT_KEY
from s4g_ray.data.places import Places
from s4g_ray.data.schema import gallery_splits
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.distributed.placement import (
    UNIT,
    Need,
    Node,
    actor_need,
    check_room,
    shard_need,
    units,
)
from s4g_ray.errors import InputError
from s4g_ray.index.plan import plan_for
from s4g_ray.pipeline.rounds.rotation import smallest_share
from s4g_ray.sampling.cells import PLANNER_CPUS


def open_run_data(
    config: RunConfig, remedy: str = CORRECT_KEY
) -> tuple[RunConfig, GeoDataset, TrainSplit]:
    """Open and check the data set of a run, and fit the model to its image sizes.

    Returns the configuration with that model, the data set and its train split. remedy: as
    open_dataset. Raises InputError as check_against_dataset, and for layers without a rate.
    """
    dataset = open_dataset(config.data.uri, config.data.image_options, remedy=remedy)
    split = TrainSplit.read(config, dataset)
    check_against_dataset(config, dataset, split)
    # imports torch, which takes seconds: errors of the input come before
    from s4g_ray.encoder.architecture.size_check import check_layers, fit_model_to_sizes

    model = fit_model_to_sizes(config.model, config.data)
    if config.train.layer_decay < 1:
        check_layers(model)
    return config.model_copy(update={"model": model}), dataset, split


def check_gpu_use(config: RunConfig) -> None:
    """Raise InputError for a run whose workers use GPUs while its embedding actors do not.

    embedding.on_cpu=true allows it. Also for actors that are told to use CPUs and GPUs.
    """
    embedding = config.embedding
    if embedding.on_cpu and embedding.gpus_per_actor:
        raise InputError(
            f"embedding.on_cpu=true contradicts embedding.gpus_per_actor="
            f"{embedding.gpus_per_actor:g}; remove one of them"
        )
    if not config.train.use_gpu or embedding.on_cpu or config.placed_embedding.gpus_per_actor:
        return
    if embedding.gpus_per_actor is None:
        raise InputError(
            f"train.gpus_per_worker={config.train.gpus_per_worker:g} leaves no share of a GPU for"
            f" embedding.num_actors={embedding.num_actors}; lower either"
        )
    raise InputError(
        "embedding.gpus_per_actor=0 embeds on CPUs although train.use_gpu=true, which takes far"
        " longer than on GPUs; remove it (actors then take"
        f" {share_rest(config.train, embedding.actors[1]):g} GPUs each), or set"
        " embedding.on_cpu=true to embed on CPUs"
    )


def check_against_dataset(config: RunConfig, dataset: GeoDataset, split: TrainSplit) -> None:
    """Raise InputError, with a line a fault, where a data set cannot give what is configured."""
    check_test_split(config, dataset)
    if config.data.val_split is not None:
        check_scored(config, dataset, "val_split", config.data.val_split)
    check_headings(config, dataset, config.data.train_split)
    check_sizes(config, dataset)
    places = split.places
    faults = []
    if len(places.ids) < config.train.batch_size:
        faults.append(
            f"train.batch_size={config.train.batch_size} exceeds the {len(places.ids)} places with"
            f" pairs of split {config.data.train_split!r} in {dataset.uri}; lower it: no place"
            " stands twice in a batch"
        )
    if config.sampling.mode != "random":
        faults += _sampling_faults(config, places)
        faults += _rotation_faults(config, split)
    faults += _positive_faults(config, split)
    faults += _gallery_faults(config, dataset, split)
    faults += _cell_faults(config, split)
    if faults:
        raise InputError("\n".join(faults))
    if split.exclusions is not None:
        check_radius(split.exclusions.places, split.exclusions.radius_m)


def _sampling_faults(config: RunConfig, places: Places) -> list[str]:
    faults = []
    if config.sampling.neighbor_pool_size > len(places.ids) - 1:
        faults.append(
            f"sampling.neighbor_pool_size={config.sampling.neighbor_pool_size} is too large for the"
            f" {len(places.ids)} places of the train split; at most {len(places.ids) - 1} is"
            " possible"
        )
    unknown = int(np.isnan(places.lat).sum())
    if unknown:
        faults.append(
            f"sampling.mode={config.sampling.mode} starts from geographic neighbors, but {unknown}"
            " train places have no lat and lon; add them, or use sampling.mode=random"
        )
    return faults


def _rotation_faults(config: RunConfig, split: TrainSplit) -> list[str]:
    """List what is wrong with the shares of mining.refresh=rotate, which hold places of both."""
    mining = config.mining
    if config.sampling.mode != "similarity" or mining.refresh != "rotate":
        return []
    faults = []
    share = smallest_share(mining, len(split.places))
    if share <= config.sampling.neighbor_pool_size:
        faults.append(
            f"mining.refresh=rotate with refresh_share={mining.refresh_share:g} takes {share} of"
            f" {len(split.places)} places in a round, which is not more than"
            f" sampling.neighbor_pool_size={config.sampling.neighbor_pool_size}; raise the share,"
            " or set mining.refresh=full"
        )
    if split.gallery is not None and not smallest_share(mining, len(split.gallery.places)):
        faults.append(
            f"mining.refresh=rotate with refresh_share={mining.refresh_share:g} leaves some rounds"
            f" without one of the {len(split.gallery.places)} places of"
            " sampling.gallery_negatives; raise the share, or set mining.refresh=full"
        )
    return faults


def _positive_faults(config: RunConfig, split: TrainSplit) -> list[str]:
    """Return a fault where hard positives are asked for and no place has several queries."""
    num_queries = 1 + int(np.count_nonzero(np.diff(split.pairs.query_ids)))
    if not config.sampling.hard_positives or num_queries > len(split.places):
        return []
    return [
        f"sampling.hard_positives={config.sampling.hard_positives:g} chooses among the queries of a"
        f" place, but each of {len(split.places)} train places has one; set it to 0"
    ]


def _gallery_faults(config: RunConfig, dataset: GeoDataset, split: TrainSplit) -> list[str]:
    wanted = config.sampling.gallery_negatives
    splits = config.sampling.gallery_splits
    found = split.gallery
    if found is None or len(found.places) >= wanted:
        return []
    total = len(dataset.columns("references", splits, ["id"])[0])
    remedy = "add references without a query to the train split, or lower it"
    if "gallery" not in splits and len(dataset.columns("references", ["gallery"], ["id"])[0]):
        remedy = "set sampling.gallery_splits=[train, gallery], " + remedy
    return [
        f"sampling.gallery_negatives={wanted} exceeds the {len(found.places)} places without a"
        f" training pair: of {total} references of {' and '.join(splits)},"
        f" {total - len(found)} stand at places with pairs; {remedy}"
    ]


def _cell_faults(config: RunConfig, split: TrainSplit) -> list[str]:
    """Return a fault where cells are searched and places of the gallery have no coordinates."""
    if config.mining.scope != "cells" or split.gallery is None:
        return []
    unknown = int(np.isnan(split.gallery.places.lat).sum())
    if not unknown:
        return []
    return [
        f"mining.scope=cells needs coordinates, but {unknown} places of the gallery have no lat and"
        " lon; add them, or set mining.scope=global"
    ]


def check_test_split(config: RunConfig, dataset: GeoDataset) -> None:
    """Raise InputError when the test split cannot be evaluated."""
    check_scored(config, dataset, "test_split", config.data.test_split)


def check_scored(config: RunConfig, dataset: GeoDataset, key: str, split: str) -> None:
    """Raise InputError when a split, which a key of `data` names, cannot be evaluated."""
    [tested] = dataset.columns("queries", [split], ["place_id"])
    [gallery] = dataset.columns("references", gallery_splits(split), ["place_id"])
    if not np.isin(tested, gallery).any():
        raise InputError(
            f"data.{key}={split!r} holds no query whose place has a reference in {dataset.uri}:"
            f" {count_noun(len(tested), 'query', 'queries')},"
            f" {count_noun(len(gallery), 'reference')}"
        )
    check_headings(config, dataset, split)


def check_headings(config: RunConfig, dataset: GeoDataset, split: str) -> None:
    """Raise InputError when headings are to be used and queries of a split have none."""
    if config.data.query_heading != "known":
        return
    [headings] = dataset.columns("queries", [split], ["heading_deg"])
    num_unknown = int((~np.isfinite(headings)).sum())
    if num_unknown:
        raise InputError(
            f"data.query_heading=known, but {num_unknown} of {len(headings)} {split} queries have"
            " no heading_deg; add it, or set data.query_heading=as_is (images that are no panoramas"
            " are never turned)"
        )


def check_sizes(config: RunConfig, dataset: GeoDataset) -> None:
    """Raise InputError when targets are to be shared and train tiles are of unknown ground."""
    if not config.train.soft_labels:
        return
    split = config.data.train_split
    columns = dataset.columns("references", [split], ["lat", "lon", "size_m"])
    num_unknown = int((~np.isfinite(columns)).any(axis=0).sum())
    if num_unknown:
        raise InputError(
            f"train.soft_labels={config.train.soft_labels:g} needs lat, lon and size_m of tiles,"
            f" but {num_unknown} of {len(columns[0])} {split} references lack one; add them, or set"
            " train.soft_labels=0"
        )


def check_resources(
    config: RunConfig, nodes: Sequence[Node], *, training: bool = True, num_pairs: int | None = None
) -> None:
    """Raise InputError when actors and tasks that run at the same time find no room on the nodes.

    training: false for embedding alone. num_pairs: None where unknown; few pairs are planned in one
    pass, without tasks.
    """
    if training:
        check_gpu_shares(config.train, nodes)
    cells = training and (num_pairs is None or num_pairs > config.sampling.max_pairs_per_cell)
    workers = _count_workers(config.train, nodes)
    always, phases = _needs_of(config, training, cells, workers)
    check_room(always, phases, nodes)


def check_gpu_shares(train: TrainConfig, nodes: Sequence[Node]) -> None:
    """Raise InputError where Ray would put more workers on a node than have a GPU there.

    Ray divides the sum of a node's GPUs by gpus_per_worker, both when it counts elastic workers and
    when it places a group over nodes: with 0.6, it tries 3 workers on a node of 2 GPUs, again and
    again. (Seen with Ray 2.60: 4 workers of 0.6 with PACK on two such nodes are never placed; 0.7,
    0.9, or SPREAD are placed at once.)
    """
    if not train.use_gpu:
        return
    lower, upper = train.workers
    allowed = [node for node in nodes if node.gpus and _worker_need(train, 1).fits(node)]
    num_tried = upper
    if lower == upper:
        if len(allowed) < 2:
            return
        if train.placement == "SPREAD":
            num_tried = -(-upper // len(allowed))
    for node in allowed:
        num_summed = min(
            units(node.gpus) // units(train.gpus),
            units(node.cpus) // units(train.cpus_per_worker),
        )
        num_fitting = int(node.gpus) * (UNIT // units(train.gpus))
        if min(num_tried, num_summed) > num_fitting:
            enough = math.floor(100 * node.gpus / (node.gpus + 1) + 1) / 100
            raise InputError(
                f"train.gpus_per_worker={train.gpus:g}: Ray would try {min(num_tried, num_summed)}"
                f" workers on a node of {node.gpus:g} GPUs, which fit into their sum, but only"
                f" {num_fitting} find a GPU; set it to {enough:g} or more, and"
                " embedding.gpus_per_actor to the rest"
            )


def _count_workers(train: TrainConfig, nodes: Sequence[Node]) -> int:
    """Return how many workers of an elastic range Ray Train starts.

    Ray Train counts what the nodes have, not what else runs on them.
    """
    room = 0
    for node in nodes:
        fitting = int(node.cpus // train.cpus_per_worker)
        if train.use_gpu:
            fitting = min(fitting, int(node.gpus // train.gpus))
        room += fitting
    lower, upper = train.workers
    return max(lower, min(upper, room))


def _worker_need(train: TrainConfig, count: int) -> Need:
    return Need(count, "worker", train.cpus_per_worker, train.gpus, train.label_selector, "train")


def _needs_of(
    config: RunConfig, training: bool, cells: bool, workers: int
) -> tuple[list[Need], list[list[Need]]]:
    """Return what holds its resources all the time, and the tasks that each phase adds.

    The first are in the order of their start: workers, embedding actors, indexes.
    Workers hold theirs through a round; embedding actors and indexes hold theirs between rounds.
    Searching tasks run after the embedding. Planning tasks run after those, or beside them where
    rounds overlap with training. A worker's loader uses the worker's resources.
    """
    train = config.train
    mining = config.mining
    mines = training and config.sampling.mode == "similarity"
    always = []
    if training:
        always.append(_worker_need(train, workers))
    always.append(actor_need(config.placed_embedding))
    if mines and mining.scope == "global":
        num_indexes = 2 if config.sampling.gallery_negatives else 1
        always.append(shard_need(mining, mining.least_shards * num_indexes))
    rounds: list[list[Need]] = [[]]  # the first embeds, with actors alone
    if mines:
        rounds.append([Need(mining.num_searchers, "searching task", mining.cpus_per_searcher)])
    planning = []
    if cells and config.sampling.mode != "random":
        planning.append(Need(1, "planning task", PLANNER_CPUS))
    if mining.schedule == "overlap":
        return always, [[*tasks, *planning] for tasks in rounds]
    return always, [*rounds, planning]


def check_index(cfg: MiningConfig, num_references: int, dim: int) -> None:
    """Raise InputError when references cannot be indexed as section `mining` asks.

    A round would fail on it, epochs after the start.
    """
    if num_references < cfg.least_shards:
        raise InputError(
            f"mining.num_shards={cfg.num_shards} exceeds the {num_references} references to index;"
            " lower it"
        )
    try:
        plan_for(cfg, num_references, dim)
    except ValueError as error:
        raise InputError(str(error)) from error
