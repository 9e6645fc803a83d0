"""Bound the disk that a run takes, from its configuration and sizes. Pure but for check_room.

The counts follow from the rule of retention (retention/rule.py), at its worst moment: just before
it is applied, with a round that is being written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s4g_ray.amounts import format_bytes
from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import InputError
from s4g_ray.pipeline.budget.sizes import RunSizes
from s4g_ray.pipeline.rounds.graphs import gallery_width
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.storage import files

ID_BYTES = 16  # of a row of an embedding table: id and place_id
# of a neighbor in a graph's Parquet, id and score, at most: measured 5.4 to 6.3 for random
# neighbors among 1e6 to 1e8 places
NEIGHBOR_BYTES = 7
# of a row of a plan: measured 10 to 15, for ids up to 1e12; two ids as they are take 16
PLAN_BYTES = 17
VERSIONS_OF_INDEX = 3  # two in service, and one that is being written


@dataclass(frozen=True)
class Stock:
    """A kind of artefact: bytes of one, and how many lie there at once, at most."""

    name: str
    one: int
    count: int

    @property
    def total(self) -> int:
        """The bytes of all."""
        return self.one * self.count


def list_stocks(
    config: RunConfig, sizes: RunSizes, index_bytes: Sequence[float] = ()
) -> list[Stock]:
    """Return what a run's folder holds at most. index_bytes: of one version of each index."""
    stocks = [
        Stock("checkpoints", checkpoint_bytes(config, sizes), count_checkpoints(config)),
        Stock("embeddings", table_bytes(config, sizes), 2 + config.embedding.keep),
        Stock("plans", plan_bytes(config, sizes), 4 + config.sampling.keep_plans),
    ]
    if config.sampling.mode != "random":
        stocks.append(Stock("graphs", graph_bytes(config, sizes), count_graphs(config)))
    if config.sampling.mode == "similarity" and index_bytes:
        stocks.append(Stock("indexes", int(sum(index_bytes)), VERSIONS_OF_INDEX))
    return stocks


def checkpoint_bytes(config: RunConfig, sizes: RunSizes) -> int:
    """Return the bytes of a checkpoint: weights, two moments of AdamW, and the trained weights."""
    copies = 3 if config.train.ema_decay is None else 4
    return 4 * copies * sizes.parameters


def table_bytes(config: RunConfig, sizes: RunSizes) -> int:
    """Return the bytes of the largest embedding table: of a round that mines and evaluates."""
    data = config.data
    splits = {data.test_split}
    if data.val_split is not None:
        splits.add(data.val_split)
    if config.sampling.mode == "similarity":
        splits.add(data.train_split)
        if config.sampling.gallery_negatives:
            splits |= set(config.sampling.gallery_splits)
    num_rows = sum(sizes.images(sorted(splits), data.test_split).values())
    width = 2 if config.embedding.dtype == "float16" else 4
    return num_rows * (width * sizes.dim + ID_BYTES)


def graph_bytes(config: RunConfig, sizes: RunSizes) -> int:
    """Return the bytes of one version of the graphs, of all collections."""
    sampling = config.sampling
    width = sampling.neighbor_pool_size
    if sampling.gallery_negatives:
        width += gallery_width(sampling, config.train.batch_size)
    return sizes.places * (NEIGHBOR_BYTES * width + ID_BYTES)


def plan_bytes(config: RunConfig, sizes: RunSizes) -> int:
    """Return the bytes of an epoch's plan."""
    batches = sizes.pairs // config.train.batch_size
    return PLAN_BYTES * (sizes.pairs + batches * config.sampling.gallery_negatives)


def count_checkpoints(config: RunConfig) -> int:
    """Return how many checkpoints lie in a run at once, at most.

    The newest ones, one that is being written, the untrained and the best one, and those that
    rounds wait for.
    """
    best = 1 if config.data.val_split is not None else 0
    most = config.checkpoint.keep + 2 + best + _count_waiting(config)
    if config.checkpoint.every_steps is not None:
        return most
    return min(most, config.train.epochs + 1)


def count_graphs(config: RunConfig) -> int:
    """Return how many versions of the graphs lie in a run at once, at most.

    Those that epochs may use, one that is written, those that branches from kept checkpoints begin
    with, and mining.keep.
    """
    mining = config.mining
    every = mining.every_epochs
    if config.sampling.mode == "geographic":
        return 1
    usable = 2 + math.ceil(_window(config) / every)
    older = math.ceil((config.checkpoint.keep + mining.lag) / every)
    best = 1 + mining.lag // every if config.data.val_split is not None else 0
    most = usable + older + best + mining.keep
    if mining.schedule == "overlap":
        most += _count_waiting(config)
    return min(most, config.train.epochs // every + 1)


def _window(config: RunConfig) -> int:
    """Return the epochs between a checkpoint and the first epoch that cannot begin without it."""
    mining = config.mining
    if mining.schedule == "sync":
        return 0
    if mining.when_late == "reuse":
        return mining.staleness_bound + 1
    return mining.lag + mining.every_epochs


def _count_waiting(config: RunConfig) -> int:
    """Return how many checkpoints rounds wait for at once, at most.

    An epoch waits for its mining round, so only those of a window are open. Evaluations are
    postponed while a mining round is late, in the worst case all of them.
    """
    if config.mining.schedule == "sync":
        return 1
    schedule = Schedule(config)
    epochs = range(config.train.epochs + 1)
    mined = [int(schedule.mines_after(epoch)) for epoch in epochs]
    scored = sum(schedule.evaluates_after(epoch) for epoch in epochs)
    width = _window(config)
    return max(sum(mined[first : first + width]) for first in epochs) + scored


def describe_stocks(stocks: Sequence[Stock]) -> str:
    """Return a line: `disk: at most 12 GB: checkpoints 6 x 1 GB, graphs ...`."""
    total = format_bytes(sum(stock.total for stock in stocks))
    parts = [f"{stock.name} {stock.count} x {format_bytes(stock.one)}" for stock in stocks]
    return f"disk: at most {total}: {', '.join(parts)}"


def check_room(run_dir: str, stocks: Sequence[Stock], held: int = 0) -> str | None:
    """Compare a run's disk with what its file system has free.

    held: bytes that the run's folder holds already. Returns a warning where it may fill up; None
    where there is room, and for object stores. Raises InputError where not even one artefact of
    each kind fits beside one that replaces it.
    """
    if not files.is_local(run_dir):
        return None
    free = free_bytes(run_dir) + held
    most = sum(stock.total for stock in stocks)
    # an index may be of a smaller kind than the largest, which its stock counts
    needed = [stock for stock in stocks if stock.name != "indexes"]
    least = sum(min(stock.count, 2) * stock.one for stock in needed)
    if free >= most:
        return None
    remedy = (
        "choose another run_dir, or lower checkpoint.keep, embedding.keep, mining.keep,"
        " sampling.keep_plans or sampling.neighbor_pool_size, or set embedding.dtype=float16"
    )
    if free < least:
        raise InputError(
            f"{run_dir}: its file system has {format_bytes(free)} for this run, which needs at"
            f" least {format_bytes(least)} ({describe_stocks(stocks)}); {remedy}"
        )
    return (
        f"warning: the file system of {run_dir} has {format_bytes(free)} for this run, which may"
        f" take up to {format_bytes(most)}; {remedy}"
    )


def free_bytes(run_dir: str) -> int:
    """Return the free bytes of the file system that a local folder is on, or will be."""
    path = Path(run_dir)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
