from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.distributed.placement import (
    Need,
    Node,
    NoRoomError,
    Packing,
    check_room,
    nodes_of,
    selects,
)
from s4g_ray.errors import InputError

ZONES = st.sampled_from([{}, {"zone": "a"}, {"zone": "b"}])
NODES = st.lists(
    st.builds(Node, st.integers(2, 16).map(lambda n: n / 4), st.integers(0, 2), ZONES), max_size=3
)
SELECTORS = st.sampled_from([{}, {}, {}, {}, {"zone": "a"}, {"zone": "!b"}, {"zone": "in(a,b)"}])
NEEDS = st.builds(
    Need,
    st.integers(1, 3),
    st.just("thing"),
    st.integers(0, 5).map(lambda n: n / 4),
    st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.3, 0.6, 1.0, 2.0]),
    SELECTORS,
)


@pytest.mark.parametrize(
    ("wanted", "matching", "others"),
    [
        ("a", ["a"], ["b", "", None]),
        ("!a", ["b", "", None], ["a"]),
        ("in(a,b)", ["a", "b"], ["c", "a,b", None]),
        ("in(a, b)", ["a", "b"], ["c", None]),
        ("!in(a,b)", ["c", None], ["a", "b"]),
    ],
)
def test_selectors_mean_the_same_as_in_ray(
    wanted: str, matching: list[str | None], others: list[str | None]
) -> None:
    assert all(selects(wanted, label) for label in matching)
    assert not any(selects(wanted, label) for label in others)


@pytest.mark.parametrize("wanted", ["in(a", "in()", "!!a", "a)"])
def test_a_selector_of_an_unknown_form_is_refused(wanted: str) -> None:
    with pytest.raises(InputError, match="is none of a, !a"):
        selects(wanted, "a")


def test_only_nodes_that_are_alive_count() -> None:
    alive = {
        "Alive": True,
        "Resources": {"CPU": 4.0, "GPU": 1.0, "memory": 9e9},
        "Labels": {"zone": "a"},
    }
    found = nodes_of(
        [alive, {**alive, "Alive": False}, {"Alive": True, "Resources": {}, "Labels": {}}]
    )
    assert found == [Node(4.0, 1.0, {"zone": "a"}, 9.0), Node(0.0, memory_gb=0.0)]


def ways_to_place(things: Sequence[Need], nodes: Sequence[Node]) -> Iterator[bool]:
    """Yield, for each assignment of things to nodes and GPUs, whether the resources suffice."""
    spots = [(n, gpus) for n, node in enumerate(nodes) for gpus in _choices(int(node.gpus))]
    for chosen in itertools.product(spots, repeat=len(things)):
        yield _is_possible(
            [(thing, *spot) for thing, spot in zip(things, chosen, strict=True)], nodes
        )


def _choices(num_gpus: int) -> list[tuple[int, ...]]:
    choices: list[tuple[int, ...]] = []
    for size in range(num_gpus + 1):
        choices.extend(itertools.combinations(range(num_gpus), size))
    return choices


def _is_possible(placed: list[tuple[Need, int, tuple[int, ...]]], nodes: Sequence[Node]) -> bool:
    cpus: dict[int, float] = defaultdict(float)
    gpus: dict[tuple[int, int], float] = defaultdict(float)
    for need, node, devices in placed:
        cpus[node] += need.cpus
        whole = need.gpus > 1
        if len(devices) != (round(need.gpus) if whole else int(need.gpus > 0)):
            return False
        for device in devices:
            gpus[node, device] += 1.0 if whole else need.gpus
        zone = nodes[node].labels.get("zone")
        accepted = {"a": zone == "a", "!b": zone != "b", "in(a,b)": zone is not None}
        if "zone" in need.selector and not accepted[need.selector["zone"]]:
            return False
    full = all(cpus[n] <= nodes[n].cpus + 1e-9 for n in cpus)
    return full and all(
        used <= 1 + 1e-9 and device < nodes[n].gpus for (n, device), used in gpus.items()
    )


@settings(deadline=None, max_examples=400)
@given(
    st.lists(NEEDS, max_size=3),
    st.lists(st.lists(NEEDS, min_size=1, max_size=2), min_size=1, max_size=2),
    NODES,
)
def test_accepted_needs_are_placed_and_those_always_there_do_not_move_between_phases(
    always: list[Need], phases: list[list[Need]], nodes: list[Node]
) -> None:
    try:
        packings = check_room(always, phases, nodes)
    except InputError:
        return
    num_always = sum(need.count for need in always)
    for packing, extra in zip(packings, phases, strict=True):
        found = [(placed.need, placed.node, placed.gpus) for placed in packing.placed]
        assert _is_possible(found, nodes)
        wanted = [need for need in (*always, *extra) for _ in range(need.count)]
        assert sorted(map(repr, wanted)) == sorted(repr(placed.need) for placed in packing.placed)
        assert packing.placed[:num_always] == packings[0].placed[:num_always]


@settings(deadline=None, max_examples=150)
@given(st.lists(NEEDS, min_size=1, max_size=2), NODES)
def test_needs_refused_by_totals_or_labels_cannot_be_placed(
    needs: list[Need], nodes: list[Node]
) -> None:
    things = [need for need in needs for _ in range(min(need.count, 2))]
    needs = [
        Need(things.count(need), need.name, need.cpus, need.gpus, need.selector)
        for need in dict.fromkeys(things)
    ]
    try:
        check_room([], [needs], nodes)
    except InputError as error:
        if re.search("are needed|fits no node", str(error)):
            assert not any(ways_to_place(things, nodes))


@settings(deadline=None, max_examples=150)
@given(NEEDS, NODES)
def test_needs_of_one_kind_alone_are_placed_whenever_possible(
    need: Need, nodes: list[Node]
) -> None:
    assert Packing(nodes).add(need) == any(ways_to_place([need] * need.count, nodes))


def refusal_of(always: list[Need], extra: list[Need], nodes: list[Node]) -> str | None:
    try:
        check_room(always, [extra], nodes)
    except InputError as error:
        return str(error)
    return None


SEARCHING = Need(1, "searching task", 0.25)


@pytest.mark.parametrize(
    ("always", "nodes", "message"),
    [
        ([Need(2, "worker", 4)], [Node(4), Node(4.25)], None),
        (
            [Need(2, "worker", 4)],
            [Node(6), Node(3)],
            "no node has room for a worker of 4 CPUs beside 1 worker x 4: the one with the most has"
            " 3 of 3 CPUs left; lower what each takes, or add or enlarge nodes",
        ),
        (
            [Need(2, "worker", 1), Need(1, "embedding actor", 3)],
            [Node(2.5), Node(2.75)],
            "no node has room for an embedding actor of 3 CPUs beside 2 workers x 1: the one with"
            " the most has 2.75 of 2.75 CPUs left",
        ),
        (
            [Need(3, "worker", 0.1, 0.6)],
            [Node(1, 2)],
            "no node has room for a worker of 0.1 CPUs and 0.6 GPUs beside 2 workers x 0.6: the one"
            " with the most has 0.8 of 1 CPU and 0.4, 0.4 of its 2 GPUs left",
        ),
        ([Need(2, "worker", 0.1, 0.6), Need(2, "embedding actor", 0.1, 0.4)], [Node(1, 2)], None),
        ([Need(30, "worker", 0.1)], [Node(3.25)], None),
        (
            [Need(1, "worker", 1, 0, {"zone": "c"}, "train")],
            [Node(4), Node(4, 0, {"zone": "a", "ray.io/node-id": "f"})],
            "train.label_selector={'zone': 'c'} fits no node; the nodes have the labels {},"
            " {'zone': 'a'}; change it, or",
        ),
        (
            [Need(2, "worker", 2, 0, {"zone": "!b"}, "train")],
            [Node(3), Node(4, 0, {"zone": "b"})],
            "no node that train.label_selector={'zone': '!b'} selects has room for a worker of"
            " 2 CPUs beside 1 worker x 2: the one with the most has 1 of 3 CPUs left",
        ),
        # the shards may run anywhere: they leave the only node in zone a to the worker
        (
            [Need(2, "index shard", 1), Need(1, "worker", 0.5, 0, {"zone": "a"}, "train")],
            [Node(0.5, 0, {"zone": "a"}), Node(2.25)],
            None,
        ),
        # workers start first; actors that started first would lie on one GPU
        ([Need(4, "worker", 0.1, 0.6), Need(4, "embedding actor", 0.1, 0.4)], [Node(2, 4)], None),
        (
            [Need(4, "embedding actor", 0.1, 0.4), Need(4, "worker", 0.1, 0.6)],
            [Node(2, 4)],
            "no node has room for a worker of 0.1 CPUs and 0.6 GPUs beside 4 embedding actors x 0.4"
            " + 2 workers x 0.6: the one with the most has",
        ),
        # actors without a GPU leave the CPUs of the node with the GPU
        ([Need(1, "worker", 2, 1), Need(2, "embedding actor", 1)], [Node(2, 1), Node(2.25)], None),
    ],
)
def test_each_needs_room_on_a_single_node(
    always: list[Need], nodes: list[Node], message: str | None
) -> None:
    found = refusal_of(always, [SEARCHING], nodes)
    if message is None:
        assert found is None
    else:
        assert (found or "").startswith(message)


def test_memory_is_placed_node_by_node_where_nodes_say_how_much_they_have() -> None:
    nodes = [Node(4, memory_gb=10), Node(4, memory_gb=7)]
    shards = Need(3, "index shard", 0, memory_gb=5)
    check_room([shards], [[]], nodes)
    check_room([Need(9, "index shard", 0, memory_gb=5)], [[]], [Node(4)])  # unknown: no limit
    with pytest.raises(
        NoRoomError,
        match=r"20 GB of memory are needed \(4 index shards x 5\), but the cluster has 17; set"
        r" mining\.index_kind",
    ):
        check_room([dataclasses.replace(shards, count=4)], [[]], nodes)
    with pytest.raises(
        NoRoomError,
        match=r"no node has room for an index shard of 0 CPUs and 8 GB of memory beside 1 index"
        r" shard x 1: the one with the most has 4 of 4 CPUs and 7 of 7 GB of memory left",
    ):
        check_room(
            [Need(1, "index shard", 1, memory_gb=5), Need(1, "index shard", 0, memory_gb=8)],
            [[]],
            nodes,
        )
