"""Whether what a run keeps alive at the same time finds room on the nodes of a cluster. No Ray."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, Literal, Self

from s4g_ray.config.schema import EmbeddingConfig, MiningConfig
from s4g_ray.errors import InputError

UNIT = 10_000  # Ray counts a resource in ten-thousandths
NODE_ID = "ray.io/node-id"  # a label that Ray gives each node, of no use to a reader
REMEDIES = {
    "CPU": "lower num_workers, num_actors, num_shards, num_searchers or what each takes, or raise ray.num_cpus",
    "GPU": "to do without, set train.use_gpu=false train.precision=auto embedding.gpus_per_actor=0"
    " mining.gpus_per_shard=0",
}


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has in all."""

    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)


def nodes_of(ray_nodes: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The nodes that are alive, from what ray.nodes() gives."""
    return [
        Node(
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            dict(node["Labels"]),
        )
        for node in ray_nodes
        if node["Alive"]
    ]


@dataclass(frozen=True)
class Need:
    """What actors or tasks of one kind take of a cluster, each; `name` is of one of them."""

    count: int
    name: str
    cpus: float
    gpus: float = 0.0
    selector: Mapping[str, str] = field(default_factory=dict, hash=False)
    section: str = ""  # of the configuration, that the selector stands in

    @property
    def of_each(self) -> str:
        """`4 CPUs and 1 GPUs`."""
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")

    @property
    def selection(self) -> str:
        """The selector as its configuration key; empty where there is none."""
        return f"{self.section}.label_selector={dict(self.selector)}" if self.selector else ""

    def fits(self, node: Node) -> bool:
        """Whether the node's labels are those that are selected."""
        return all(selects(wanted, node.labels.get(key)) for key, wanted in self.selector.items())

    def share(self, kind: Literal["CPU", "GPU"]) -> float:
        """CPUs or GPUs of each."""
        return self.cpus if kind == "CPU" else self.gpus


def actor_need(cfg: EmbeddingConfig) -> Need:
    """What the actors take that encode."""
    return Need(
        cfg.num_actors,
        "embedding actor",
        cfg.cpus_per_actor,
        cfg.gpus_per_actor,
        cfg.label_selector,
        "embedding",
    )


def shard_need(cfg: MiningConfig, count: int) -> Need:
    """What so many shards of the index take."""
    return Need(
        count, "index shard", cfg.cpus_per_shard, cfg.gpus_per_shard, cfg.label_selector, "mining"
    )


def count_noun(count: int, one: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count} {one}" + "s" * (count != 1)


def selects(wanted: str, label: str | None) -> bool:
    """Whether `a`, `!a`, `in(a,b)` or `!in(a,b)` selects a node with that label (None: without the key).

    A node without the key is one that is not `a`. Raises InputError for another form. Source: Ray, label selectors.
    """
    match = re.fullmatch(r"(!?)(?:in\(([^()!]+)\)|([^()!]*))", wanted)
    if match is None:
        raise InputError(f"label_selector: {wanted!r} is none of a, !a, in(a,b), !in(a,b)")
    values = [value.strip() for value in match[2].split(",")] if match[2] else [match[3]]
    return (label in values) != bool(match[1])


def describe_labels(nodes: Sequence[Node]) -> str:
    """The labels of the nodes, each kind once."""
    kinds = [{k: v for k, v in node.labels.items() if k != NODE_ID} for node in nodes]
    shown = list(dict.fromkeys(str(dict(sorted(kind.items()))) for kind in kinds))
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")


class NoRoomError(InputError):
    """What runs at the same time does not fit on the nodes there are; `needs` would have to."""

    def __init__(self, message: str, needs: Iterable[Need]) -> None:
        super().__init__(message)
        self.needs = tuple(needs)


@dataclass(frozen=True)
class Placed:
    """One of a need's actors or tasks, on a node, by number, and on GPUs of it, by number."""

    need: Need
    node: int
    gpus: tuple[int, ...]


class _Room:
    """What is left of a node, in Ray's units."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cpus = _units(node.cpus)
        self.gpus = [
            min(UNIT, _units(node.gpus) - start) for start in range(0, _units(node.gpus), UNIT)
        ]

    def take(self, need: Need) -> tuple[int, ...] | None:
        """Make room for one, and name its GPUs; None where there is no room. A share of a GPU is of one GPU."""
        if _units(need.cpus) > self.cpus or not need.fits(self.node):
            return None
        share, num = min(_units(need.gpus), UNIT), math.ceil(_units(need.gpus) / UNIT)
        fitting = sorted((left, gpu) for gpu, left in enumerate(self.gpus) if left >= share)
        if len(fitting) < num:
            return None
        self.cpus -= _units(need.cpus)
        chosen = tuple(gpu for _, gpu in fitting[:num])
        for gpu in chosen:
            self.gpus[gpu] -= share
        return chosen


class Packing:
    """Needs placed on nodes, kind after kind; each kind fills the nodes that have the least left first."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.rooms = [_Room(node) for node in nodes]
        self.placed: list[Placed] = []

    def copy(self) -> Self:
        """Another, that goes on from here."""
        return copy.deepcopy(self)

    def add(self, need: Need) -> bool:
        """Place all of a kind; False, with as many placed as there is room for, when some are left over."""
        left = need.count
        order = sorted(
            range(len(self.rooms)), key=lambda n: (sum(self.rooms[n].gpus), self.rooms[n].cpus)
        )
        for number in order:
            while left and (gpus := self.rooms[number].take(need)) is not None:
                self.placed.append(Placed(need, number, gpus))
                left -= 1
        return not left

    def add_all(self, needs: Iterable[Need]) -> Need | None:
        """Place kinds in order; returns the first that does not fit."""
        return next((need for need in needs if not self.add(need)), None)


def _pack(
    always: Sequence[Need], phases: Sequence[Sequence[Need]], nodes: Sequence[Node]
) -> list[Packing]:
    """What is always there, placed once, with what each phase adds beside it: a packing for each phase.

    The largest go first, then other orders are tried. It is a rule of thumb: it may miss a tight packing, and Ray,
    which places one after the other, may get stuck where this finds room (starts that time out tell). Raises
    NoRoomError that names what does not fit when the largest go first.
    """
    refusal: NoRoomError | None = None
    for order in permutations(_largest_first(always)):
        packing, needs = Packing(nodes), [*always]
        stuck, packings = packing.add_all(order), []
        for extra in phases if stuck is None else ():
            packings.append(packing.copy())
            packing_stuck = packings[-1].add_all(_largest_first(extra))
            if packing_stuck is not None:
                stuck, packing, needs = packing_stuck, packings[-1], [*always, *extra]
                break
        if stuck is None:
            return packings
        refusal = refusal or NoRoomError(_describe_stuck(stuck, packing), needs)
    assert refusal is not None
    raise refusal


def check_room(
    always: Sequence[Need], phases: Sequence[Sequence[Need]], nodes: Sequence[Node]
) -> list[Packing]:
    """What is always there and what each phase adds beside it -> where it could be, for each phase.

    Raises NoRoomError with the arithmetic when some phase does not fit: in all, by labels, or node by node.
    """
    for extra in phases:
        _check_total("CPU", [*always, *extra], nodes)
        _check_total("GPU", [*always, *extra], nodes)
    for need in (*always, *(need for extra in phases for need in extra)):
        if not any(need.fits(node) for node in nodes):
            raise NoRoomError(
                f"{need.selection} fits no node; the labels there are {describe_labels(nodes)}; change it, or start"
                " nodes with `ray start --labels`",
                [*always, *(need for extra in phases for need in extra)],
            )
    return _pack(always, phases, nodes)


def _check_total(kind: Literal["CPU", "GPU"], needs: Sequence[Need], nodes: Sequence[Node]) -> None:
    needed = sum(need.count * _units(need.share(kind)) for need in needs)
    there = sum(_units(node.cpus if kind == "CPU" else node.gpus) for node in nodes)
    if needed > there:
        sums = _sum_up(kind, {need: need.count for need in needs})
        raise NoRoomError(
            f"{needed / UNIT:g} {kind}s are needed ({sums}), but the cluster has {there / UNIT:g}; {REMEDIES[kind]}",
            needs,
        )


def _sum_up(kind: Literal["CPU", "GPU"], counts: Mapping[Need, int]) -> str:
    """`2 workers x 1 + 1 loading task x 0.25`."""
    return " + ".join(
        f"{count_noun(count, need.name)} x {need.share(kind):g}"
        for need, count in counts.items()
        if need.share(kind)
    )


def _describe_stuck(need: Need, packing: Packing) -> str:
    kind: Literal["CPU", "GPU"] = "GPU" if need.gpus else "CPU"
    rooms = [room for room in packing.rooms if need.fits(room.node)]
    most = max(rooms, key=lambda room: (max(room.gpus, default=0) if need.gpus else 0, room.cpus))
    left = f"{most.cpus / UNIT:g} of {most.node.cpus:g} CPUs"
    if need.gpus:
        left += f" and {', '.join(f'{gpu / UNIT:g}' for gpu in most.gpus) or 'none'} of its {most.node.gpus:g} GPUs"
    beside = _sum_up(kind, Counter(placed.need for placed in packing.placed))
    article = "an" if need.name[0] in "aeiou" else "a"
    return (
        f"no node{' that ' + need.selection + ' fits' if need.selector else ''} has room for {article} {need.name} of"
        f" {need.of_each}{' beside ' + beside if beside else ''}: the one with the most has {left} left; lower what"
        " each takes, or add or enlarge nodes"
    )


def _largest_first(needs: Sequence[Need]) -> list[Need]:
    return sorted(needs, key=lambda need: (bool(need.selector), need.gpus, need.cpus), reverse=True)


def _units(amount: float) -> int:
    return round(amount * UNIT)
