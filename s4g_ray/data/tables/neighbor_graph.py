"""Define NeighborGraph, the nearest places of each place, and its Parquet files.

A graph is read and written whole (load, save), or part by part where it exceeds memory.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats32, Ints
from s4g_ray.storage import files
from s4g_ray.storage.manifest import (
    Manifest,
    Part,
    Stamp,
    open_published,
    publish,
    read_part,
    write_part,
)
from s4g_ray.storage.parquet import open_parquet_part, refuse_extension_types

PAIRS_PER_BLOCK = 2**24  # of a graph: 200 MB, and as Parquet about 100
PAIRS_PER_ROW_GROUP = 2**19  # 4,096 places at k=128, about 3 MB
READERS = 16  # threads that read places of parts; each waits for the file system
# Half the size and a third of the reading time of Parquet's defaults: ids of near places differ by
# little.
ENCODINGS = {
    "neighbors.list.element": "DELTA_BINARY_PACKED",
    "scores.list.element": "BYTE_STREAM_SPLIT",
}


@dataclass(frozen=True)
class NeighborGraph:
    """The nearest places of each place.

    place_ids[P] int64, unique; neighbors[P, K] int64 place_ids, nearest first, -1 pads at the end;
    scores[P, K] float32 (inner product, or minus metres) or None. Raises ValueError for other
    shapes, repeated places, or a place among its own neighbors.
    """

    place_ids: Ints
    neighbors: Ints
    scores: Floats32 | None = None

    def __post_init__(self) -> None:
        if self.neighbors.ndim != 2 or len(self.neighbors) != len(self.place_ids):
            raise ValueError(
                f"neighbors has shape {self.neighbors.shape}; [{len(self.place_ids)}, K] is wanted"
            )
        if self.scores is not None and self.scores.shape != self.neighbors.shape:
            raise ValueError(
                f"scores has shape {self.scores.shape}, neighbors {self.neighbors.shape};"
                " give one score for each neighbor"
            )
        if len(np.unique(self.place_ids)) != len(self.place_ids):
            raise ValueError("place_ids repeats a place; give each place one row")
        if (self.neighbors == self.place_ids[:, None]).any():
            raise ValueError("a place is among its own neighbors; leave it out")

    def save(
        self, uri: str, *, stamp: Stamp | None = None, info: dict[str, Any] | None = None
    ) -> Manifest:
        """Publish as Parquet in parts of PAIRS_PER_BLOCK pairs; pads are not written."""
        k = self.neighbors.shape[1]
        blocks = list(blocks_of(len(self.place_ids), k)) or [slice(0, 0)]
        parts = []
        for number, block in enumerate(blocks):
            parts.append(write_graph_part(uri, number, self.take(block)))
        return publish_graph(uri, parts, k, stamp=stamp, info=info)

    def take(self, rows: slice) -> NeighborGraph:
        """Return a range of its places."""
        scores = None if self.scores is None else self.scores[rows]
        return NeighborGraph(self.place_ids[rows], self.neighbors[rows], scores)

    @classmethod
    def load(cls, uri: str, *, stamp: Stamp | None = None) -> NeighborGraph:
        """Read a published graph; without scores where some of its parts have none.

        Raises RunError when it is unpublished, altered, or not made from `stamp`.
        """
        return join_graphs(list(read_graph(uri, stamp=stamp)))


def blocks_of(count: int, width: int, block: int | None = None) -> Iterator[slice]:
    """Yield ranges of `count` rows of `width` neighbors.

    Each has `block` rows, or by default as many as make PAIRS_PER_BLOCK pairs.
    """
    size = block or max(1, PAIRS_PER_BLOCK // max(width, 1))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def make_unfilled(count: int, k: int) -> tuple[Ints, Floats32]:
    """Make neighbors[count, k] and scores[count, k] that hold only pads."""
    return np.full((count, k), -1, np.int64), np.full((count, k), -np.inf, np.float32)


def choose_rows(graph: NeighborGraph, chosen: Bools) -> NeighborGraph:
    """Return the graph of the places chosen[P]."""
    scores = None if graph.scores is None else graph.scores[chosen]
    return NeighborGraph(graph.place_ids[chosen], graph.neighbors[chosen], scores)


def join_graphs(graphs: Sequence[NeighborGraph]) -> NeighborGraph:
    """Join graphs of different places and equal k; without scores where one of them has none."""
    scores = [graph.scores for graph in graphs if graph.scores is not None]
    return NeighborGraph(
        np.concatenate([graph.place_ids for graph in graphs]),
        np.concatenate([graph.neighbors for graph in graphs]),
        np.concatenate(scores) if len(scores) == len(graphs) else None,
    )


def write_graph_part(uri: str, number: int, graph: NeighborGraph) -> Part:
    """Write places of a graph as one Parquet file, to be published later; pads are not written.

    Row groups hold PAIRS_PER_ROW_GROUP pairs, so that a sample of a graph can be read.
    """
    present = graph.neighbors >= 0
    ends = np.cumsum(present.sum(axis=1))
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    table = {
        "place_id": pa.array(graph.place_ids),
        "neighbors": pa.ListArray.from_arrays(offsets, _flatten(graph.neighbors, present)),
    }
    if graph.scores is not None:
        table["scores"] = pa.ListArray.from_arrays(offsets, _flatten(graph.scores, present))
    buffer = io.BytesIO()
    encodings = {name: code for name, code in ENCODINGS.items() if name.partition(".")[0] in table}
    pq.write_table(
        pa.table(table),
        buffer,
        max(1, PAIRS_PER_ROW_GROUP // max(graph.neighbors.shape[1], 1)),
        compression="zstd",
        use_dictionary=False,
        column_encoding=encodings,
    )
    return write_part(uri, f"part-{number:05d}.parquet", buffer.getvalue(), len(graph.place_ids))


def _flatten(values: NDArray[Any], present: Bools) -> pa.Array:
    """Return the present entries of values[P, K] row by row, without a copy where all are."""
    return pa.array(values.ravel() if present.all() else values[present])


def publish_graph(
    uri: str,
    parts: Sequence[Part],
    k: int,
    *,
    stamp: Stamp | None = None,
    info: dict[str, Any] | None = None,
) -> Manifest:
    """Publish written parts as a graph of at most k neighbors a place.

    Each place must be in exactly one part.
    """
    return publish(uri, "neighbors", parts, stamp, {**(info or {}), "k": k})


def read_graph(uri: str, *, stamp: Stamp | None = None) -> Iterator[NeighborGraph]:
    """Read the parts of a published graph, one after the other.

    Raises RunError as NeighborGraph.load does.
    """
    manifest = open_published(uri, "neighbors", stamp)
    k = int(manifest.info["k"])
    for part in manifest.parts:
        yield pad_rows(read_graph_part(uri, part, with_scores=True), k)


class GraphPart(NamedTuple):
    """Places of a graph: neighbors of places[i] are ids[offsets[i] : offsets[i + 1]].

    Nearest first.
    """

    places: Ints
    offsets: Ints
    ids: Ints
    scores: Floats32 | None = None


def read_graph_part(uri: str, part: Part, *, with_scores: bool = False) -> GraphPart:
    """Read a file of a published graph. Raises RunError when it is missing or altered."""
    names = None if with_scores else ["place_id", "neighbors"]
    contents = pq.read_table(io.BytesIO(read_part(uri, part)), columns=names)
    return _unpack(refuse_extension_types(contents, files.join(uri, part.name)))


def _unpack(contents: pa.Table) -> GraphPart:
    table = contents.combine_chunks()
    lists = table["neighbors"].combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    scores = None
    if "scores" in table.column_names:
        scores = table["scores"].combine_chunks().flatten().to_numpy()
    return GraphPart(
        table["place_id"].to_numpy(),
        offsets - offsets[:1].sum(),  # from 0; an empty part may have no offset
        lists.flatten().to_numpy(),
        scores,
    )


def pad_rows(part: GraphPart, k: int) -> NeighborGraph:
    """Return the places of a part with k neighbors each, pads at the end."""
    filled = np.arange(k) < np.diff(part.offsets)[:, None]
    neighbors, scores = make_unfilled(len(filled), k)
    neighbors[filled] = part.ids
    if part.scores is None:
        return NeighborGraph(part.places, neighbors)
    scores[filled] = part.scores
    return NeighborGraph(part.places, neighbors, scores)


def read_graph_samples(
    uri: str, part: Part, count: int | None = None, rng: np.random.Generator | None = None
) -> list[GraphPart]:
    """Read the places and neighbors of row groups of a part: all, or `count` that rng draws.

    Raises RunError when the part is missing, cut short or damaged; does not notice other bytes
    altered in place.
    """
    name = files.join(uri, part.name)
    with open_parquet_part(uri, part) as parquet:
        numbers = np.arange(parquet.num_row_groups)
        if count is not None and rng is not None and count < len(numbers):
            numbers = np.sort(rng.choice(numbers, count, replace=False))
        groups: list[GraphPart] = []
        for number in numbers.tolist():
            table = parquet.read_row_group(number, columns=["place_id", "neighbors"])
            groups.append(_unpack(refuse_extension_types(table, name)))
        return groups


def read_graph_places(uri: str, parts: Sequence[Part]) -> Iterator[Ints]:
    """Read only the places of parts of a published graph, in order; READERS at a time.

    Raises RunError as read_graph_samples does.
    """

    def read_places(part: Part) -> Ints:
        with open_parquet_part(uri, part) as parquet:
            table = parquet.read(columns=["place_id"])
        found = refuse_extension_types(table, files.join(uri, part.name))
        return np.asarray(found["place_id"].to_numpy(), dtype=np.int64)

    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(read_places, parts)
