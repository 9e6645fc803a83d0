"""Some rows of a written NeighborGraph, found by their places: a range of them, or a sample. No Ray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray import storage
from s4g_ray.candidate_kernels import count_shared_rows
from s4g_ray.errors import RunError, StoreError
from s4g_ray.neighbors import NeighborGraph, read_graph_part
from s4g_ray.parquet import plain
from s4g_ray.places import rows_of
from s4g_ray.shards import spread_rows

Ints = NDArray[np.int64]
SAMPLED_PLACES = 20_000  # at k=128 20 MB; a share of them is off by at most 0.004 (one standard deviation)
SAMPLE_SEED = 0


def choose_rows(graph: NeighborGraph, chosen: NDArray[np.bool_]) -> NeighborGraph:
    """The places chosen[P] of a graph."""
    scores = None if graph.scores is None else graph.scores[chosen]
    return NeighborGraph(graph.place_ids[chosen], graph.neighbors[chosen], scores)


def read_rows(uri: str, low: int, high: int, k: int) -> tuple[Ints, Ints, NDArray[np.float32]]:
    """place_ids[P], neighbors[P, k] (-1 pads) and scores[P, k] of the places within low..high of a graph's file.

    Row groups without such places are not read. Raises RunError when the file is missing or damaged.
    """
    filesystem, path = storage.filesystem_of(uri)
    try:
        read = pq.read_table(
            path, columns=["place_id", "neighbors", "scores"], filesystem=filesystem, partitioning=None,
            filters=[("place_id", ">=", low), ("place_id", "<=", high)],
        )  # fmt: skip
    except StoreError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{uri} cannot be read ({error}); it is missing, cut short or altered") from error
    table = plain(read, uri).combine_chunks()
    neighbors, scores = (table[name].combine_chunks() for name in ("neighbors", "scores"))
    filled = np.arange(k) < neighbors.value_lengths().to_numpy(zero_copy_only=False)[:, None]
    padded = np.full(filled.shape, -1, dtype=np.int64)
    padded_scores = np.full(filled.shape, -np.inf, dtype=np.float32)
    padded[filled], padded_scores[filled] = neighbors.flatten().to_numpy(), scores.flatten().to_numpy()
    return table["place_id"].to_numpy(), padded, padded_scores


def sample_places(places: Ints) -> Ints:
    """At most SAMPLED_PLACES of places[P], ascending: one from each of as many equal ranges, all where no more are."""
    return places[spread_rows(len(places), SAMPLED_PLACES, SAMPLE_SEED)]


@dataclass(frozen=True)
class SampledRows:
    """neighbors[S, k] of places[S], ascending, in a published graph; pads (-1) alone for a place that it lacks."""

    places: Ints
    neighbors: Ints

    @classmethod
    def read(cls, uri: str, places: Ints) -> SampledRows:
        """In one pass over the graph, a part at a time. Raises RunError when it is unpublished or altered."""
        manifest = storage.open_published(uri, "neighbors")
        neighbors = np.full((len(places), int(manifest.info["k"])), -1, dtype=np.int64)
        for part in manifest.parts:
            graph = read_graph_part(uri, part)
            rows = rows_of(places, graph.places)
            here = np.flatnonzero(rows >= 0)
            at = graph.offsets[here, None] + np.arange(neighbors.shape[1])
            filled = at < graph.offsets[here + 1, None]
            found = np.full(at.shape, -1, dtype=np.int64)
            found[filled] = graph.ids[at[filled]]
            neighbors[rows[here]] = found
        return cls(places, neighbors)

    def compare(self, graph: NeighborGraph) -> tuple[int, int]:
        """How many neighbors the sampled ones of a graph's places have there, and how many of these stand here too."""
        rows = rows_of(self.places, graph.place_ids)
        ours = graph.neighbors[rows >= 0]
        return int((ours >= 0).sum()), count_shared_rows(ours, self.neighbors[rows[rows >= 0]])
