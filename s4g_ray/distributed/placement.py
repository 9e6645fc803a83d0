"""Check whether everything that runs at the same time fits on the nodes of a cluster.

Pure: imports no Ray. A Need describes actors or tasks of one kind. check_room places all needs on
the nodes, or raises NoRoomError with the arithmetic.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from s4g_ray.amounts import count_noun
from s4g_ray.config.schema import EmbeddingConfig, MiningConfig
from s4g_ray.errors import InputError

UNIT = 10_000  # Ray counts a resource in ten-thousandths
NODE_ID = "ray.io/node-id"  # a label that Ray gives each node; left out of messages
Kind = Literal["CPU", "GPU", "memory"]
KINDS: tuple[Kind, ...] = ("CPU", "GPU", "memory")
REMEDIES = {
    "CPU": "lower num_workers, num_actors, num_shards, num_searchers or what each takes, or raise"
    " ray.num_cpus",
    "GPU": "to run without GPUs, set train.use_gpu=false train.precision=auto"
    " embedding.gpus_per_actor=0 mining.gpus_per_shard=0",
    "memory": "set mining.index_kind to one that needs less (auto chooses one that fits), raise"
    " mining.num_shards on more nodes, or start nodes with `ray start --memory`",
}


@dataclass(frozen=True)
class Node:
    """The resources of a node of the cluster: all of them, unless it says what is free.

    memory_gb: what Ray may give to actors and tasks that ask for memory; None: unknown, no limit.
    """

    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    memory_gb: float | None = None


def nodes_of(ray_nodes: Iterable[Mapping[str, Any]]) -> list[Node]:
    """Return the nodes that are alive, from the answer of ray.nodes()."""
    return [
        Node(
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            dict(node["Labels"]),
            node["Resources"].get("memory", 0.0) / 1e9,
        )
        for node in ray_nodes
        if node["Alive"]
    ]


@dataclass(frozen=True)
class Need:
    """The resources that each of `count` actors or tasks of one kind takes."""

    count: int
    name: str  # of one of them, such as "worker"
    cpus: float
    gpus: float = 0.0
    selector: Mapping[str, str] = field(default_factory=dict, hash=False)
    section: str = ""  # the section of the configuration that holds the selector
    memory_gb: float = 0.0

    @property
    def of_each(self) -> str:
        """Return the resources of each, as `4 CPUs and 1 GPU`."""
        terms = [count_noun(self.cpus, "CPU")]
        if self.gpus:
            terms.append(count_noun(self.gpus, "GPU"))
        if self.memory_gb:
            terms.append(f"{self.memory_gb:.3g} GB of memory")
        return " and ".join(terms)

    @property
    def selection(self) -> str:
        """Return the selector with its configuration key; empty without a selector."""
        if not self.selector:
            return ""
        return f"{self.section}.label_selector={dict(self.selector)}"

    def fits(self, node: Node) -> bool:
        """Return whether the selector accepts the node's labels."""
        return all(selects(wanted, node.labels.get(key)) for key, wanted in self.selector.items())

    def share(self, kind: Kind) -> float:
        """Return the CPUs, GPUs or GB of memory of each."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_gb}[kind]


def actor_need(cfg: EmbeddingConfig) -> Need:
    """Return the need of the actors that embed images: of the smallest number of them.

    cfg: RunConfig.placed_embedding.
    """
    assert cfg.gpus_per_actor is not None
    return Need(
        cfg.actors[0],
        "embedding actor",
        cfg.cpus_per_actor,
        cfg.gpus_per_actor,
        cfg.label_selector,
        "embedding",
    )


def shard_need(cfg: MiningConfig, count: int, memory_gb: float = 0.0) -> Need:
    """Return the need of `count` index shards of memory_gb each; 0: not planned yet."""
    return Need(
        count,
        "index shard",
        cfg.cpus_per_shard,
        cfg.gpus_per_shard,
        cfg.label_selector,
        "mining",
        memory_gb,
    )


def selects(wanted: str, label: str | None) -> bool:
    """Return whether `a`, `!a`, `in(a,b)` or `!in(a,b)` selects a node with that label.

    `label` is None for a node without the key; `!a` and `!in(a,b)` select it. Raises InputError for
    any other form. Source: Ray, label selectors.
    """
    match = re.fullmatch(r"(!?)(?:in\(([^()!]+)\)|([^()!]*))", wanted)
    if match is None:
        raise InputError(f"label_selector: {wanted!r} is none of a, !a, in(a,b), !in(a,b)")
    values = [value.strip() for value in match[2].split(",")] if match[2] else [match[3]]
    return (label in values) != bool(match[1])


def describe_labels(nodes: Sequence[Node]) -> str:
    """Return the labels of the nodes as text: each set of labels once, at most 10 of them."""
    sets: list[str] = []
    for node in nodes:
        labels = {key: node.labels[key] for key in sorted(node.labels) if key != NODE_ID}
        if str(labels) not in sets:
            sets.append(str(labels))
    text = ", ".join(sets[:10])
    return f"{text} and {len(sets) - 10} more" if len(sets) > 10 else text


class NoRoomError(InputError):
    """The error of `needs` that run at the same time and do not fit on the nodes."""

    def __init__(self, message: str, needs: Iterable[Need]) -> None:
        super().__init__(message)
        self.needs = tuple(needs)


@dataclass(frozen=True)
class Placed:
    """One actor or task of a need, with its node and its GPUs there, both by number."""

    need: Need
    node: int
    gpus: tuple[int, ...]


class _Room:
    """The free resources of a node, in Ray's units: CPUs, memory, and the rest of each GPU."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cpus = units(node.cpus)
        self.memory = math.inf if node.memory_gb is None else units(node.memory_gb)
        self.gpus = [
            min(UNIT, units(node.gpus) - start) for start in range(0, units(node.gpus), UNIT)
        ]

    def take(self, need: Need) -> tuple[int, ...] | None:
        """Take the resources of one, and return its GPUs; None where there is no room.

        A share of a GPU comes from a single GPU, the one with the least left that holds it.
        """
        if units(need.cpus) > self.cpus or not need.fits(self.node):
            return None
        if units(need.memory_gb) > self.memory:
            return None
        share = min(units(need.gpus), UNIT)
        num_gpus = math.ceil(units(need.gpus) / UNIT)
        fitting = sorted((left, gpu) for gpu, left in enumerate(self.gpus) if left >= share)
        if len(fitting) < num_gpus:
            return None
        self.cpus -= units(need.cpus)
        self.memory -= units(need.memory_gb)
        chosen = tuple(gpu for _, gpu in fitting[:num_gpus])
        for gpu in chosen:
            self.gpus[gpu] -= share
        return chosen


class Packing:
    """Places needs on nodes, one kind after the other.

    Each kind fills the nodes with the least free resources first.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.rooms = [_Room(node) for node in nodes]
        self.placed: list[Placed] = []

    def copy(self) -> Self:
        """Return a copy with the same needs placed, to which more can be added."""
        return copy.deepcopy(self)

    def add(self, need: Need) -> bool:
        """Place all of a kind, or as many as there is room for.

        Returns whether all are placed.
        """
        num_left = need.count
        order = sorted(
            range(len(self.rooms)), key=lambda n: (sum(self.rooms[n].gpus), self.rooms[n].cpus)
        )
        for number in order:
            while num_left > 0:
                gpus = self.rooms[number].take(need)
                if gpus is None:
                    break
                self.placed.append(Placed(need, number, gpus))
                num_left -= 1
        return num_left == 0

    def add_all(self, needs: Iterable[Need]) -> Need | None:
        """Place kinds in order, up to the first that does not fit. Returns that kind, or None."""
        for need in needs:
            if not self.add(need):
                return need
        return None


def _pack(
    always: Sequence[Need], phases: Sequence[Sequence[Need]], nodes: Sequence[Node]
) -> list[Packing]:
    """Place the needs that are always there, and add those of each phase: a packing a phase.

    Places in the given order, as Ray does: what starts first does not leave room on purpose for
    what follows. Raises NoRoomError for the first need that does not fit.
    """
    base = Packing(nodes)
    misfit = base.add_all(always)
    if misfit is not None:
        raise NoRoomError(_describe_misfit(misfit, base), always)
    packings = []
    for extra in phases:
        packing = base.copy()
        misfit = packing.add_all(_largest_first(extra))
        if misfit is not None:
            raise NoRoomError(_describe_misfit(misfit, packing), [*always, *extra])
        packings.append(packing)
    return packings


def check_room(
    always: Sequence[Need], phases: Sequence[Sequence[Need]], nodes: Sequence[Node]
) -> list[Packing]:
    """Place the needs that are always there and those of each phase -> a packing for each phase.

    always: in the order in which they start.
    Raises NoRoomError with the arithmetic when a phase does not fit: by the totals of the cluster,
    by labels, or node by node.
    """
    for extra in phases:
        for kind in KINDS:
            _check_total(kind, [*always, *extra], nodes)
    needs = [*always]
    for extra in phases:
        needs.extend(extra)
    for need in needs:
        if not any(need.fits(node) for node in nodes):
            raise NoRoomError(
                f"{need.selection} fits no node; the nodes have the labels"
                f" {describe_labels(nodes)}; change it, or start nodes with `ray start --labels`",
                needs,
            )
    return _pack(always, phases, nodes)


def _check_total(kind: Kind, needs: Sequence[Need], nodes: Sequence[Node]) -> None:
    num_needed = sum(need.count * units(need.share(kind)) for need in needs)
    num_there = sum(_units_of(kind, node) for node in nodes)
    if num_needed > num_there:
        terms = _list_terms(kind, {need: need.count for need in needs})
        needed = num_needed / UNIT
        wanted = f"{needed:g} GB of memory" if kind == "memory" else count_noun(needed, kind)
        raise NoRoomError(
            f"{wanted} {'is' if needed == 1 else 'are'} needed ({terms}), but the cluster has"
            f" {num_there / UNIT:g}; {REMEDIES[kind]}",
            needs,
        )


def _units_of(kind: Kind, node: Node) -> float:
    """Return what a node has of a kind, in Ray's units."""
    if kind == "memory":
        return math.inf if node.memory_gb is None else units(node.memory_gb)
    return units(node.cpus if kind == "CPU" else node.gpus)


def _list_terms(kind: Kind, counts: Mapping[Need, int]) -> str:
    """Return the terms of a sum as text: `2 workers x 1 + 1 planning task x 0.5`."""
    return " + ".join(
        f"{count_noun(count, need.name)} x {need.share(kind):g}"
        for need, count in counts.items()
        if need.share(kind)
    )


def _describe_misfit(need: Need, packing: Packing) -> str:
    """Return the message of a need that finds no room beside the needs placed before it."""
    kind: Kind = "GPU" if need.gpus else "CPU"
    nodes = f"no node that {need.selection} selects" if need.selector else "no node"
    article = "an" if need.name[0] in "aeiou" else "a"
    one = f"{article} {need.name} of {need.of_each}"
    terms = _list_terms(kind, Counter(placed.need for placed in packing.placed))
    if terms:
        one += f" beside {terms}"
    return (
        f"{nodes} has room for {one}: the one with the most has {_describe_largest(need, packing)}"
        " left; lower what each takes, or add or enlarge nodes"
    )


def _describe_largest(need: Need, packing: Packing) -> str:
    """Return the free resources of the node with the most of them that the need's labels allow."""

    def free(room: _Room) -> tuple[float, ...]:
        largest_gpu = max(room.gpus, default=0) if need.gpus else 0
        memory = room.memory if need.memory_gb else 0
        return largest_gpu, memory, room.cpus

    largest = max((room for room in packing.rooms if need.fits(room.node)), key=free)
    cpus = f"{largest.cpus / UNIT:g} of {count_noun(largest.node.cpus, 'CPU')}"
    if need.memory_gb and largest.node.memory_gb is not None:
        memory = f"{largest.memory / UNIT:.3g} of {largest.node.memory_gb:.3g} GB of memory"
        cpus = f"{cpus}, {memory}" if need.gpus else f"{cpus} and {memory}"
    if not need.gpus:
        return cpus
    gpus = ", ".join(f"{gpu / UNIT:g}" for gpu in largest.gpus) or "none"
    return f"{cpus} and {gpus} of its {count_noun(largest.node.gpus, 'GPU')}"


def _largest_first(needs: Sequence[Need]) -> list[Need]:
    """Sort needs: those with a selector first, then by GPUs and CPUs, descending."""
    return sorted(needs, key=lambda need: (bool(need.selector), need.gpus, need.cpus), reverse=True)


def units(amount: float) -> int:
    """Convert CPUs or GPUs to Ray's units."""
    return round(amount * UNIT)
