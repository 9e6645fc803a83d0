"""Estimate the hours of a run by stage, and what binds each. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from s4g_ray.amounts import count_noun
from s4g_ray.config.schema import RunConfig
from s4g_ray.index.cost import Cost
from s4g_ray.pipeline.budget.rates import Rates
from s4g_ray.pipeline.budget.sizes import RunSizes
from s4g_ray.pipeline.rounds.rotation import count_shares
from s4g_ray.pipeline.rounds.schedule import Schedule

RAY_START_S = 6.0  # of a cluster on one machine: seen 3 to 11


@dataclass(frozen=True)
class Machines:
    """The cluster of a run: logical CPUs and GPUs of all nodes, and where that is known from.

    starts_ray: the run starts a cluster of its own.
    """

    cpus: float
    gpus: float
    num_nodes: int
    source: str
    starts_ray: bool = False


@dataclass(frozen=True)
class Stage:
    """A stage of a run: seconds of one, how many there are, and what binds it.

    seconds None: unknown, and `binds` says why. beside: it runs beside training, and costs time
    only as far as training waits for it.
    """

    name: str
    seconds: float | None
    count: int
    binds: str
    beside: bool = False

    @property
    def total(self) -> float | None:
        """The seconds of all."""
        return None if self.seconds is None else self.seconds * self.count


@dataclass(frozen=True)
class Work:
    """Seconds that a part of a stage takes by itself; None: unknown."""

    seconds: float | None
    binds: str


def list_stages(
    config: RunConfig,
    sizes: RunSizes,
    rates: Rates,
    machines: Machines,
    indexes: Mapping[str, Cost],
) -> list[Stage]:
    """Estimate the stages of a run.

    indexes: cost of each index for a full round, or of searching within cells, as `cells`.
    """
    schedule = Schedule(config)
    epochs = range(config.train.epochs + 1)
    mined = [epoch for epoch in epochs if schedule.mines_after(epoch)]
    scored = [epoch for epoch in epochs if schedule.evaluates_after(epoch)]
    both = len(set(mined) & set(scored))
    beside = schedule.overlaps and bool(mined)
    stages = [_start_stage(config, rates, machines, indexes)]
    if config.sampling.mode != "random":
        graph_s = _times(rates.graph_place_s, sizes.places)
        stages.append(Stage("geographic neighbors", graph_s, 1, "the driver"))
    plan_s = _times(rates.plan_pair_s, sizes.pairs)
    stages.append(_stage("plan", [Work(plan_s, "the driver")], config.train.epochs))
    stages.append(_stage("epoch", _epoch_work(config, sizes, rates, machines), config.train.epochs))
    mined_images = sum(sizes.mined_images(config).values())
    scored_images = sum(sizes.scored_images(config).values())
    share = average_share(config, len(mined))
    if mined:
        work = _embedding_work(config, rates, machines, mined_images * share)
        stages.append(_stage("embed for mining", work, len(mined), beside))
        for name, cost in indexes.items():
            where = "the searching tasks" if name == "cells" else f"index shards of {name}"
            # a share is searched among itself: queries and references both shrink; within cells,
            # which are smaller than its blocks, the queries alone
            searched = share if name == "cells" else _search_share(config, len(mined))
            build = Work(cost.build_s * share, where)
            search = Work(cost.search_s * searched, where)
            if cost.build_s:  # none within cells
                stages.append(_stage(f"index {name}", [build], len(mined), beside))
            stages.append(_stage(f"search {name}", [search], len(mined), beside))
    work = _embedding_work(config, rates, machines, scored_images)
    stages.append(_stage("embed for evaluation", work, len(scored), beside and both > 0))
    score_s = _times(rates.score_s, sizes.scored_pairs(config))
    stages.append(_stage("evaluate", [Work(score_s, "the driver")], len(scored), beside))
    return stages


def _start_stage(
    config: RunConfig, rates: Rates, machines: Machines, indexes: Mapping[str, Cost]
) -> Stage:
    """Estimate the start of Ray and of each kind of process, one kind after the other.

    Processes of a kind load their libraries at the same time, as many as there are CPUs.
    """
    counts = [1, config.train.workers[1], config.embedding.actors[1]]  # first: Train's controller
    counts += [config.mining.least_shards] * len([name for name in indexes if name != "cells"])
    rounds = sum(math.ceil(count / max(machines.cpus, 1)) for count in counts)
    seconds = _times(rates.process_start_s, rounds)
    if seconds is not None and machines.starts_ray:
        seconds += RAY_START_S
    return Stage("start of all processes", seconds, 1, "loading of libraries")


def average_share(config: RunConfig, num_rounds: int) -> float:
    """Return the share of the places that a round takes, on average over the rounds of a run."""
    if config.mining.refresh == "full" or num_rounds < 2:
        return 1.0
    return (1 + (num_rounds - 1) / count_shares(config.mining)) / num_rounds


def _search_share(config: RunConfig, num_rounds: int) -> float:
    """Return the same of queries times references."""
    if config.mining.refresh == "full" or num_rounds < 2:
        return 1.0
    return (1 + (num_rounds - 1) / count_shares(config.mining) ** 2) / num_rounds


def total_seconds(config: RunConfig, stages: Sequence[Stage]) -> float | None:
    """Return the seconds of a run; None where a stage is unknown.

    Stages beside training cost what exceeds the lag_epochs epochs that may hide a round.
    """
    if any(stage.total is None for stage in stages):
        return None
    total = sum(stage.total or 0.0 for stage in stages if not stage.beside)
    rounds = [stage for stage in stages if stage.beside]
    if rounds:
        epoch_s = sum(stage.seconds or 0.0 for stage in stages if stage.name in ("epoch", "plan"))
        num_rounds = max(stage.count for stage in rounds)
        round_s = sum(stage.total or 0.0 for stage in rounds) / max(num_rounds, 1)
        # a round begins every `every_epochs`; longer ones follow each other without a pause
        hidden = min(config.mining.lag, config.mining.every_epochs) * epoch_s
        total += num_rounds * max(0.0, round_s - hidden)
    return total


def _epoch_work(config: RunConfig, sizes: RunSizes, rates: Rates, machines: Machines) -> list[Work]:
    train = config.train
    num_workers = train.workers[1]
    step_s = _times(rates.train_pair_s, sizes.pairs / num_workers)
    encoder = "the GPUs of the workers" if train.use_gpu else "the encoder, on the workers' CPUs"
    if rates.includes_loading:
        return [Work(step_s, encoder)]
    load_s = _times(rates.load_pair_s, sizes.pairs)
    loaders = num_workers * max(1, train.loader_processes)
    works = [Work(step_s, encoder)]
    if load_s is not None:
        slots = min(loaders, machines.cpus)
        by_cpus = loaders > machines.cpus
        on = count_noun(slots, "CPU") if by_cpus else f"{slots:g} loader_processes"
        works.append(Work(load_s / slots, f"reading and decoding, on {on}"))
        if not train.use_gpu and step_s is not None:
            cpu_s = step_s * num_workers * train.threads_per_worker + load_s
            works.append(Work(cpu_s / machines.cpus, count_noun(machines.cpus, "CPU")))
    return works


def _embedding_work(
    config: RunConfig, rates: Rates, machines: Machines, num_images: float
) -> list[Work]:
    embedding = config.placed_embedding
    num_actors = embedding.actors[1]
    encode_s = _times(rates.embed_s, num_images / num_actors)
    on_gpu = bool(embedding.gpus_per_actor)
    encoder = "the GPUs of the actors" if on_gpu else "the encoder, on the actors' CPUs"
    works = [Work(encode_s, encoder)]
    if rates.includes_loading or rates.decode_s is None:
        return works
    decode_s = rates.decode_s * num_images
    slots = min(num_actors * embedding.decoders, machines.cpus)
    works.append(Work(decode_s / slots, f"decoding, by {count_noun(slots, 'thread')}"))
    if not on_gpu and encode_s is not None:
        cpu_s = encode_s * num_actors * embedding.threads_per_actor + decode_s
        works.append(Work(cpu_s / machines.cpus, count_noun(machines.cpus, "CPU")))
    return works


def _stage(name: str, works: Sequence[Work], count: int, beside: bool = False) -> Stage:
    """Make a stage of parts that run at the same time: the longest binds it."""
    unknown = [work for work in works if work.seconds is None]
    if unknown:
        return Stage(name, None, count, f"{unknown[0].binds}: not known", beside)
    longest = max(works, key=lambda work: work.seconds or 0.0)
    return Stage(name, longest.seconds, count, longest.binds, beside)


def _times(rate: float | None, count: float) -> float | None:
    if rate is None or not math.isfinite(rate):
        return None
    return rate * count
