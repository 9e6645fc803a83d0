"""Count the neighbors that a new graph shares with the graph before it, on a sample of places.

No Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Ints, spread_rows
from s4g_ray.data.tables.neighbor_graph import NeighborGraph, read_graph_part
from s4g_ray.mining.candidate_kernels import count_shared_rows
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage.manifest import open_published

# 20 MB at k=128; a share over them is off by at most 0.004 (one standard deviation)
SAMPLED_PLACES = 20_000
SAMPLE_SEED = 0


def sample_places(places: Ints) -> Ints:
    """Draw at most SAMPLED_PLACES of places[P], ascending: one from each of as many equal ranges.

    Returns all places when there are no more.
    """
    return places[spread_rows(len(places), SAMPLED_PLACES, SAMPLE_SEED)]


@dataclass(frozen=True)
class SampledRows:
    """The neighbors of sampled places in a published graph.

    places[S], ascending; neighbors[S, k], pads (-1). A place that the graph lacks has only pads.
    """

    places: Ints
    neighbors: Ints

    @classmethod
    def read(cls, uri: str, places: Ints) -> SampledRows:
        """Read the rows of places[S] in one pass over a graph, a part at a time.

        Raises RunError when the graph is unpublished or altered.
        """
        manifest = open_published(uri, "neighbors")
        neighbors = np.full((len(places), int(manifest.info["k"])), -1, dtype=np.int64)
        for part in manifest.parts:
            graph = read_graph_part(uri, part)
            rows = rows_of(places, graph.places)
            sampled = np.flatnonzero(rows >= 0)
            at = graph.offsets[sampled, None] + np.arange(neighbors.shape[1])
            is_filled = at < graph.offsets[sampled + 1, None]
            found = np.full(at.shape, -1, dtype=np.int64)
            found[is_filled] = graph.ids[at[is_filled]]
            neighbors[rows[sampled]] = found
        return cls(places, neighbors)

    def compare(self, graph: NeighborGraph) -> tuple[int, int]:
        """Count the neighbors of the sampled places in `graph`, and those that are here too."""
        rows = rows_of(self.places, graph.place_ids)
        new = graph.neighbors[rows >= 0]
        old = self.neighbors[rows[rows >= 0]]
        return int((new >= 0).sum()), count_shared_rows(new, old)
