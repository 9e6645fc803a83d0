"""Nearest places: NeighborGraph (Parquet in, Parquet out) and exact geographic neighbors on the sphere."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray import storage
from s4g_ray.parquet import plain
from s4g_ray.place_tree import BarredNeighbors, Metres, PlaceTree, blocks_of, curve_order
from s4g_ray.places import Exclusions, Places, unit_sphere
from s4g_ray.progress import Update, ignore

# half the size and a third of the reading time of Parquet's defaults: ids of near places differ by little
ENCODINGS = {"neighbors.list.element": "DELTA_BINARY_PACKED", "scores.list.element": "BYTE_STREAM_SPLIT"}


@dataclass(frozen=True)
class NeighborGraph:
    """The nearest places of each place.

    place_ids[P] int64, unique; neighbors[P, K] int64 place_ids, nearest first, -1 pads at the end;
    scores[P, K] float32 (inner product, or minus metres) or None. Raises ValueError for other shapes,
    repeated places, or a place among its own neighbors.
    """

    place_ids: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    scores: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.neighbors.ndim != 2 or len(self.neighbors) != len(self.place_ids):
            raise ValueError(f"neighbors has shape {self.neighbors.shape}; [{len(self.place_ids)}, K] is wanted")
        if self.scores is not None and self.scores.shape != self.neighbors.shape:
            raise ValueError(f"scores has shape {self.scores.shape}, neighbors {self.neighbors.shape}")
        if len(np.unique(self.place_ids)) != len(self.place_ids):
            raise ValueError("place_ids repeats a place")
        if (self.neighbors == self.place_ids[:, None]).any():
            raise ValueError("a place is among its own neighbors")

    def save(
        self, uri: str, *, stamp: storage.Stamp | None = None, info: dict[str, Any] | None = None
    ) -> storage.Manifest:
        """Publish as partitioned Parquet; pads are not written."""
        k = self.neighbors.shape[1]
        blocks = list(blocks_of(len(self.place_ids), k)) or [slice(0, 0)]
        parts = [write_graph_part(uri, number, self.take(block)) for number, block in enumerate(blocks)]
        return publish_graph(uri, parts, k, stamp=stamp, info=info)

    def take(self, rows: slice) -> NeighborGraph:
        """Some of its places."""
        scores = None if self.scores is None else self.scores[rows]
        return NeighborGraph(self.place_ids[rows], self.neighbors[rows], scores)

    @classmethod
    def load(cls, uri: str, *, stamp: storage.Stamp | None = None) -> NeighborGraph:
        """Read a published graph. Raises RunError when it is unpublished, altered, or not made from `stamp`."""
        parts = list(read_graph(uri, stamp=stamp))
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            np.concatenate([part.place_ids for part in parts]),
            np.concatenate([part.neighbors for part in parts]),
            np.concatenate(scores) if scores else None,
        )


def write_graph_part(uri: str, number: int, graph: NeighborGraph, *, row_group_size: int | None = None) -> storage.Part:
    """Write some places of a graph that is to be published, as one Parquet file; pads are not written.

    row_group_size: places in a row group, for a file that is read by ranges of places; none: Parquet's default.
    """
    present = graph.neighbors >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32))
    table = {
        "place_id": pa.array(graph.place_ids),
        "neighbors": pa.ListArray.from_arrays(offsets, _flat(graph.neighbors, present)),
    }
    if graph.scores is not None:
        table["scores"] = pa.ListArray.from_arrays(offsets, _flat(graph.scores, present))
    buffer = io.BytesIO()
    encodings = {name: code for name, code in ENCODINGS.items() if name.partition(".")[0] in table}
    pq.write_table(
        pa.table(table), buffer, row_group_size, compression="zstd", use_dictionary=False, column_encoding=encodings
    )
    return storage.write_part(uri, f"part-{number:05d}.parquet", buffer.getvalue(), len(graph.place_ids))


def _flat(values: NDArray[Any], present: NDArray[np.bool_]) -> pa.Array:
    """What is present of values[P, K], without a copy where all is."""
    return pa.array(values.ravel() if present.all() else values[present])


def publish_graph(
    uri: str,
    parts: Sequence[storage.Part],
    k: int,
    *,
    stamp: storage.Stamp | None = None,
    info: dict[str, Any] | None = None,
) -> storage.Manifest:
    """Publish written parts as a graph of at most k neighbors a place; every place stands in one part."""
    return storage.publish(uri, "neighbors", parts, stamp, {**(info or {}), "k": k})


def read_graph(uri: str, *, stamp: storage.Stamp | None = None) -> Iterator[NeighborGraph]:
    """The parts of a published graph, one after the other. Raises RunError as NeighborGraph.load does."""
    manifest = storage.open_published(uri, "neighbors", stamp)
    for part in manifest.parts:
        yield _padded(read_graph_part(uri, part, with_scores=True), int(manifest.info["k"]))


class GraphPart(NamedTuple):
    """Some places of a graph: the neighbors of places[i] are ids[offsets[i] : offsets[i + 1]], nearest first."""

    places: NDArray[np.int64]
    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    scores: NDArray[np.float32] | None = None


def read_graph_part(uri: str, part: storage.Part, *, with_scores: bool = False) -> GraphPart:
    """A file of a published graph. Raises RunError when it is not what was published."""
    columns = None if with_scores else ["place_id", "neighbors"]
    read = pq.read_table(io.BytesIO(storage.read_part(uri, part)), columns=columns)
    table = plain(read, storage.join(uri, part.name)).combine_chunks()
    lists = table["neighbors"].combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    scores = table["scores"].combine_chunks().flatten().to_numpy() if "scores" in table.column_names else None
    return GraphPart(table["place_id"].to_numpy(), offsets - offsets[:1].sum(), lists.flatten().to_numpy(), scores)


def _padded(part: GraphPart, k: int) -> NeighborGraph:
    filled = np.arange(k) < np.diff(part.offsets)[:, None]
    neighbors, scores = _unfilled(len(filled), k)
    neighbors[filled] = part.ids
    if part.scores is None:
        return NeighborGraph(part.places, neighbors)
    scores[filled] = part.scores
    return NeighborGraph(part.places, neighbors, scores)


def geographic_neighbors(
    lat: NDArray[np.float64], lon: NDArray[np.float64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
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
) -> storage.Manifest:
    """Publish the geographic graph block by block, without ever holding it; on_progress counts places.

    Raises ValueError as geographic_neighbors does.
    """
    return _write_blocks(uri, geographic_blocks(places, k, exclusions), len(places), k, info, on_progress)


def nearest_places(queries: Places, targets: Places, k: int, exclusions: Exclusions | None = None) -> NeighborGraph:
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
        yield NeighborGraph(lost[rows], *_unfilled(len(lost[rows]), k))


def write_nearest_places(
    uri: str,
    queries: Places,
    targets: Places,
    k: int,
    exclusions: Exclusions | None = None,
    *,
    info: dict[str, Any] | None = None,
    on_progress: Update = ignore,
) -> storage.Manifest:
    """Publish the graph of nearest_places block by block, as write_geographic_graph does. Raises ValueError alike."""
    return _write_blocks(uri, nearest_blocks(queries, targets, k, exclusions), len(queries), k, info, on_progress)


def _assemble(places: Places, k: int, blocks: Iterator[NeighborGraph]) -> NeighborGraph:
    """The graph whose blocks hold all places, in the order of `places`."""
    neighbors, scores = _unfilled(len(places), k)
    for block in blocks:
        rows = places.rows(block.place_ids)
        neighbors[rows], scores[rows] = block.neighbors, block.scores
    return NeighborGraph(places.ids, neighbors, scores)


def _write_blocks(
    uri: str, blocks: Iterator[NeighborGraph], count: int, k: int, info: dict[str, Any] | None, on_progress: Update
) -> storage.Manifest:
    """Publish blocks that hold `count` places together, one at a time."""
    parts: list[storage.Part] = []
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
        raise ValueError(f"{num_places - len(_located(places))} places have a coordinate that is not finite")
    return PlaceTree(places.ids, places.lat, places.lon, dtype)


def _located(places: Places) -> NDArray[np.int64]:
    """The rows of places whose position is known."""
    return np.flatnonzero(np.isfinite(places.lat) & np.isfinite(places.lon))


def _unfilled(count: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """neighbors[count, k] and scores[count, k], all pads."""
    return np.full((count, k), -1, np.int64), np.full((count, k), -np.inf, np.float32)
