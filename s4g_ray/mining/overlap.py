"""Count the neighbors that a new graph shares with the graph before it, on a sample of places.

No Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Ints, spread_rows
from s4g_ray.data.tables.neighbor_graph import GraphPart, NeighborGraph, read_graph_samples
from s4g_ray.mining.candidate_kernels import count_shared_rows
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage.manifest import open_published

# 20 MB at k=128; a share over them is off by at most 0.004 (one standard deviation) where places
# differ independently
SAMPLED_PLACES = 20_000
SAMPLED_GROUPS = 64  # row groups that they are taken from, where the graph has more
SAMPLE_SEED = 0


@dataclass(frozen=True)
class SampledRows:
    """The neighbors of sampled places in a published graph.

    places[S], ascending; neighbors[S, k], pads (-1).
    """

    places: Ints
    neighbors: Ints

    @classmethod
    def read(cls, uri: str) -> SampledRows:
        """Read at most SAMPLED_PLACES rows of a graph, from SAMPLED_GROUPS random row groups.

        All of a graph with no more places. Time and memory do not grow with the graph. Raises
        RunError when the graph is unpublished, or a part that is read is missing or cut short.
        """
        manifest = open_published(uri, "neighbors")
        k = int(manifest.info["k"])
        total = sum(part.rows for part in manifest.parts)
        rng = np.random.default_rng(SAMPLE_SEED)
        shares = [part.rows / max(total, 1) for part in manifest.parts]
        counts: list[int | None] = [None] * len(shares)
        if total > SAMPLED_PLACES:
            counts = rng.multinomial(SAMPLED_GROUPS, shares).tolist()
        places = [np.zeros(0, np.int64)]
        neighbors = [np.zeros((0, k), np.int64)]
        for part, count in zip(manifest.parts, counts, strict=True):
            if not part.rows or count == 0:
                continue
            groups = read_graph_samples(uri, part, count, rng)
            wanted = part.rows
            if count is not None:
                wanted = -(-SAMPLED_PLACES * count // (SAMPLED_GROUPS * len(groups)))
            for group in groups:
                rows = spread_rows(len(group.places), wanted, SAMPLE_SEED)
                places.append(group.places[rows])
                neighbors.append(_pad_rows(group, rows, k))
        all_places = np.concatenate(places)
        order = np.argsort(all_places)
        return cls(all_places[order], np.concatenate(neighbors)[order])

    def compare(self, graph: NeighborGraph) -> tuple[int, int]:
        """Count the neighbors of the sampled places in `graph`, and those that are here too."""
        rows = rows_of(self.places, graph.place_ids)
        new = graph.neighbors[rows >= 0]
        old = self.neighbors[rows[rows >= 0]]
        return int((new >= 0).sum()), count_shared_rows(new, old)


def _pad_rows(group: GraphPart, rows: Ints, k: int) -> Ints:
    """Return the neighbors[S, k] of some rows of a part, pads (-1)."""
    at = group.offsets[rows, None] + np.arange(k)
    is_filled = at < group.offsets[rows + 1, None]
    neighbors = np.full(at.shape, -1, dtype=np.int64)
    neighbors[is_filled] = group.ids[at[is_filled]]
    return neighbors
