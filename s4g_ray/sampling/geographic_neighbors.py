"""Find the nearest places on the ground, exactly, and publish them as neighbor graphs."""

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
from s4g_ray.sampling.place_tree import ExclusionFilter, Metres, PlaceTree, curve_order
from s4g_ray.storage.manifest import Manifest, Part


def geographic_neighbors(lat: Floats64, lon: Floats64, k: int) -> tuple[Ints, Floats64]:
    """Find the k nearest other points of each point: lat[N], lon[N] -> indices[N, k], metres[N, k].

    lat and lon are degrees. Exact, nearest first, by a k-d tree on unit-sphere xyz: poles and the
    antimeridian need no care, memory is O(N k). A point is never its own neighbor; another point at
    the same position is. Raises ValueError when k is not within 1..N-1 or a coordinate is not
    finite.
    """
    tree = _build_tree(Places(np.arange(len(lat)), lat, lon), k, np.float64)
    indices = np.empty((len(lat), k), np.int64)
    metres = np.empty((len(lat), k))
    for block, block_indices, block_metres in tree.search(tree.ids, tree.xyz, k):
        rows = tree.order[block]
        indices[rows] = block_indices
        metres[rows] = block_metres
    return indices, metres


def geographic_graph(places: Places, k: int, exclusions: Exclusions | None = None) -> NeighborGraph:
    """Return the graph of the k nearest places of each place, without those that are excluded.

    Scores are minus metres; pads where too few places are left. Raises ValueError as
    geographic_neighbors does.
    """
    return _join_blocks(places, k, geographic_blocks(places, k, exclusions))


def geographic_blocks(
    places: Places, k: int, exclusions: Exclusions | None = None, *, block: int | None = None
) -> Iterator[NeighborGraph]:
    """Yield geographic_graph in blocks of `block` places, along a space-filling curve.

    block: None for about 16 million pairs. Each place is in one block. Memory is O(N + block x k).
    Raises ValueError as geographic_neighbors does.
    """
    tree = _build_tree(places, k)
    excluded = None if exclusions is None else ExclusionFilter(exclusions, places)
    for rows, neighbors, metres in tree.search(tree.ids, tree.xyz, k, excluded, block):
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
    """Publish the geographic graph block by block, without ever holding the whole graph.

    on_progress counts places. Raises ValueError as geographic_neighbors does.
    """
    blocks = geographic_blocks(places, k, exclusions)
    return _write_blocks(uri, blocks, len(places), k, info, on_progress)


def nearest_places(
    queries: Places, targets: Places, k: int, exclusions: Exclusions | None = None
) -> NeighborGraph:
    """Return the graph of the k nearest targets of each query place.

    The place itself and excluded places are left out. Scores are minus metres; pads where there are
    fewer; a place without coordinates finds none, and none finds it. Raises ValueError for k < 1.
    """
    return _join_blocks(queries, k, nearest_blocks(queries, targets, k, exclusions))


def nearest_blocks(
    queries: Places, targets: Places, k: int, exclusions: Exclusions | None = None
) -> Iterator[NeighborGraph]:
    """Yield nearest_places in blocks of about 16 million pairs, along a space-filling curve.

    Query places without coordinates come last. Each query place is in one block. Memory is
    O(N + block x k). Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"{k=} is less than 1; ask for at least one neighbor")
    located_queries = _find_located(queries)
    located_targets = _find_located(targets)
    xyz = unit_sphere(queries.lat[located_queries], queries.lon[located_queries])
    order = curve_order(xyz)
    ids = queries.ids[located_queries[order]]
    xyz = xyz[order]
    tree = PlaceTree(
        targets.ids[located_targets], targets.lat[located_targets], targets.lon[located_targets]
    )
    excluded = None if exclusions is None else ExclusionFilter(exclusions, queries, targets)
    for rows, neighbors, metres in tree.search(ids, xyz, k, excluded):
        yield NeighborGraph(ids[rows], neighbors, np.negative(metres, out=metres))
    unlocated = np.delete(queries.ids, located_queries)
    for rows in blocks_of(len(unlocated), k):
        yield NeighborGraph(unlocated[rows], *make_unfilled(len(unlocated[rows]), k))


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
    """Publish the graph of nearest_places block by block, as write_geographic_graph does.

    Raises ValueError for k < 1.
    """
    blocks = nearest_blocks(queries, targets, k, exclusions)
    return _write_blocks(uri, blocks, len(queries), k, info, on_progress)


def _join_blocks(places: Places, k: int, blocks: Iterator[NeighborGraph]) -> NeighborGraph:
    """Return the graph whose blocks hold all places, in the order of `places`."""
    neighbors, scores = make_unfilled(len(places), k)
    for block in blocks:
        rows = places.rows(block.place_ids)
        neighbors[rows] = block.neighbors
        scores[rows] = block.scores
    return NeighborGraph(places.ids, neighbors, scores)


def _write_blocks(
    uri: str,
    blocks: Iterator[NeighborGraph],
    num_places: int,
    k: int,
    info: dict[str, Any] | None,
    on_progress: Update,
) -> Manifest:
    """Publish blocks that together hold `num_places` places, one at a time."""
    parts: list[Part] = []
    num_done = 0
    for number, block in enumerate(blocks):
        parts.append(write_graph_part(uri, number, block))
        num_done += len(block.place_ids)
        on_progress(num_done, num_places)
    return publish_graph(uri, parts, k, info=info)


def _build_tree(places: Places, k: int, dtype: type[Metres] = np.float32) -> PlaceTree:
    """Build a tree of places. Raises ValueError as geographic_neighbors does."""
    num_places = len(places)
    if not 1 <= k <= num_places - 1:
        raise ValueError(f"k={k} is not within 1..{num_places - 1}: there are {num_places} places")
    num_unlocated = num_places - len(_find_located(places))
    if num_unlocated:
        raise ValueError(f"{num_unlocated} places have a coordinate that is not finite")
    return PlaceTree(places.ids, places.lat, places.lon, dtype)


def _find_located(places: Places) -> Ints:
    """Return the rows of places whose position is known."""
    return np.flatnonzero(np.isfinite(places.lat) & np.isfinite(places.lon))
