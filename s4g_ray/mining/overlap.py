"""Some rows of a written NeighborGraph, found by their places: a range of them, or a sample. No Ray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Ints, spread_rows
from s4g_ray.data.tables.neighbor_graph import NeighborGraph, read_graph_part
from s4g_ray.mining.candidate_kernels import count_shared_rows
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage.manifest import open_published

SAMPLED_PLACES = (
    20_000  # at k=128 20 MB; a share of them is off by at most 0.004 (one standard deviation)
)
SAMPLE_SEED = 0


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
        manifest = open_published(uri, "neighbors")
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
