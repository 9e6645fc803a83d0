"""Carry rows of an earlier graph over into a new one, for places that were not mined. No Ray."""

from __future__ import annotations

from dataclasses import dataclass

from s4g_ray.arrays import Ints
from s4g_ray.data.tables.neighbor_graph import (
    NeighborGraph,
    choose_rows,
    pad_rows,
    read_graph_part,
    read_graph_places,
)
from s4g_ray.mining.groups import plan_groups
from s4g_ray.mining.job_plan import Row, describe_group
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage.manifest import Part, open_published


@dataclass(frozen=True)
class CarryPlan:
    """The tasks that carry rows over.

    rows: their arguments. k: the neighbors of a place in the earlier graph, at most. num_places:
    those that are carried.
    """

    rows: list[Row]
    k: int
    num_places: int

    @classmethod
    def from_graph(cls, uri: str, mined: Ints, part_mb: float, first_number: int) -> CarryPlan:
        """Plan to carry the places of a published graph that are not in mined[P], ascending.

        Tasks read consecutive parts, of which about `part_mb` megabytes remain. The first has the
        number `first_number`. Raises RunError when the graph is unpublished, or a part is missing.
        """
        manifest = open_published(uri, "neighbors")
        remaining: list[int] = []
        num_places = 0
        for part, places in zip(
            manifest.parts, read_graph_places(uri, manifest.parts), strict=True
        ):
            count = int((rows_of(mined, places) < 0).sum())
            num_places += count
            remaining.append(-(-part.num_bytes * count // max(part.rows, 1)))
        groups = plan_groups(remaining, int(part_mb * 1e6))
        rows = [
            describe_group(number, manifest.parts, group)
            for number, group in enumerate(groups, start=first_number)
        ]
        return cls(rows, int(manifest.info["k"]), num_places)


def read_carried(uri: str, part: Part, mined: Ints, k: int) -> NeighborGraph:
    """Read the places of a part of a published graph that are not in mined[P], ascending."""
    graph = pad_rows(read_graph_part(uri, part, with_scores=True), k)
    return choose_rows(graph, rows_of(mined, graph.place_ids) < 0)
