"""The nearest places on the ground, exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import unit_sphere
from s4g_ray.data.tables.neighbor_graph import (
    NeighborGraph,
    blocks_of,
    make_unfilled,
    publish_graph,
    write_graph_part,
)
from s4g_ray.progress import Update, ignore
from s4g_ray.sampling.place_tree import BarredNeighbors, Metres, PlaceTree, curve_order
from s4g_ray.storage.manifest import Manifest, Part


def geographic_neighbors(lat: Floats64, lon: Floats64, k: int) -> tuple[Ints, Floats64]:
    """The k nearest other points of each point: lat[N], lon[N] in degrees -> indices[N, k], metres[N, k].

    Exact, nearest first, by a k-d tree on unit-sphere xyz: poles and the antimeridian need no care, memory
    is O(N k). A point is never its own neighbor; another point at the same position is. Raises ValueError
    when k is not within 1..N-1 or a coordinate is not finite.
    """
    tree = _tree(Places(np.arange(len(lat)), lat, lon), k, np.float64)
    indices, metres = np.empty((len(lat), k), np.int64), np.empty((len(lat), k))
    for block, found, apart in tree.search(tree.ids, tree.xyz, k):
        indices[tree.order[block]], metres[tree.order[block]] = found, apart
    return indices, metres


def geographic_graph(places: Places, k: int, exclusions: Exclusions | None = None) -> NeighborGraph:
    """The graph of the k nearest places of each place that `exclusions` do not bar from it; scores are minus metres.

    Pads where too few are left. Raises ValueError as geographic_neighbors does.
    """
    return _assemble(places, k, geographic_blocks(places, k, exclusions))


def geographic_blocks(
    places: Places, k: int, exclusions: Exclusions | None = None, *, block: int | None = None
) -> Iterator[NeighborGraph]:
    """geographic_graph in blocks of `block` places (none: about 16 million pairs), along a space-filling curve.

    Each place stands in one block. Memory is O(N + block x k). Raises ValueError as geographic_neighbors does.
    """
    tree = _tree(places, k)
    bars = None if exclusions is None else BarredNeighbors(exclusions, places)
    for rows, neighbors, metres in tree.search(tree.ids, tree.xyz, k, bars, block):
        yield NeighborGraph(tree.ids[rows], neighbors, np.negative(metres, out=metres))


def write_geographic_graph(
    uri: str,
    places: Places,
    k: int,
    exclusions: Exclusions | None = None,
    *,
    info: dict[str, Any] | None = None,
    on_progress: Update = ignore,
) -> Manifest:
    """Publish the geographic graph block by block, without ever holding it; on_progress counts places.

    Raises ValueError as geographic_neighbors does.
    """
    return _write_blocks(
        uri, geographic_blocks(places, k, exclusions), len(places), k, info, on_progress
    )


def nearest_places(
    queries: Places, targets: Places, k: int, exclusions: Exclusions | None = None
) -> NeighborGraph:
    """The k nearest targets of each query place, but for itself and what `exclusions` bar; scores are minus metres.

    Pads where there are fewer; a place without coordinates finds none, and none finds it. Raises ValueError for
    k < 1.
    """
    return _assemble(queries, k, nearest_blocks(queries, targets, k, exclusions))


def nearest_blocks(
    queries: Places, targets: Places, k: int, exclusions: Exclusions | None = None
) -> Iterator[NeighborGraph]:
    """nearest_places in blocks of about 16 million pairs, along a space-filling curve, unknown positions last.

    Each query place stands in one block. Memory is O(N + block x k). Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"{k=} is less than 1")
    asking, known = _located(queries), _located(targets)
    xyz = unit_sphere(queries.lat[asking], queries.lon[asking])
    order = curve_order(xyz)
    ids, xyz = queries.ids[asking[order]], xyz[order]
    tree = PlaceTree(targets.ids[known], targets.lat[known], targets.lon[known])
    bars = None if exclusions is None else BarredNeighbors(exclusions, queries, targets)
    for rows, found, metres in tree.search(ids, xyz, k, bars):
        yield NeighborGraph(ids[rows], found, np.negative(metres, out=metres))
    lost = np.delete(queries.ids, asking)
    for rows in blocks_of(len(lost), k):
        yield NeighborGraph(lost[rows], *make_unfilled(len(lost[rows]), k))


def write_nearest_places(
    uri: str,
    queries: Places,
    targets: Places,
    k: int,
    exclusions: Exclusions | None = None,
    *,
    info: dict[str, Any] | None = None,
    on_progress: Update = ignore,
) -> Manifest:
    """Publish the graph of nearest_places block by block, as write_geographic_graph does. Raises ValueError alike."""
    return _write_blocks(
        uri, nearest_blocks(queries, targets, k, exclusions), len(queries), k, info, on_progress
    )


def _assemble(places: Places, k: int, blocks: Iterator[NeighborGraph]) -> NeighborGraph:
    """The graph whose blocks hold all places, in the order of `places`."""
    neighbors, scores = make_unfilled(len(places), k)
    for block in blocks:
        rows = places.rows(block.place_ids)
        neighbors[rows], scores[rows] = block.neighbors, block.scores
    return NeighborGraph(places.ids, neighbors, scores)


def _write_blocks(
    uri: str,
    blocks: Iterator[NeighborGraph],
    count: int,
    k: int,
    info: dict[str, Any] | None,
    on_progress: Update,
) -> Manifest:
    """Publish blocks that hold `count` places together, one at a time."""
    parts: list[Part] = []
    done = 0
    for number, block in enumerate(blocks):
        parts.append(write_graph_part(uri, number, block))
        done += len(block.place_ids)
        on_progress(done, count)
    return publish_graph(uri, parts, k, info=info)


def _tree(places: Places, k: int, dtype: type[Metres] = np.float32) -> PlaceTree:
    num_places = len(places)
    if not 1 <= k <= num_places - 1:
        raise ValueError(f"k={k} is not within 1..{num_places - 1}: there are {num_places} places")
    if len(_located(places)) < num_places:
        raise ValueError(
            f"{num_places - len(_located(places))} places have a coordinate that is not finite"
        )
    return PlaceTree(places.ids, places.lat, places.lon, dtype)


def _located(places: Places) -> Ints:
    """The rows of places whose position is known."""
    return np.flatnonzero(np.isfinite(places.lat) & np.isfinite(places.lon))
