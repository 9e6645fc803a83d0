from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import OutOfMemoryError

from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.places import Places
from s4g_ray.data.tables.neighbor_graph import NeighborGraph, publish_graph, write_graph_part
from s4g_ray.errors import RunError
from s4g_ray.sampling.cell_tasks import get_cancelling, plan_cells_on_cluster
from s4g_ray.sampling.cells import plan_cells
from s4g_ray.sampling.compact_graph import CompactGraph
from s4g_ray.sampling.geographic_neighbors import geographic_graph
from tests.sampling.test_cells import draw_city, draw_pairs

pytestmark = pytest.mark.cluster


def publish_in_parts(uri: str, graph: NeighborGraph, num_parts: int) -> str:
    """Publish a graph in parts of random places."""
    order = np.random.default_rng(0).permutation(len(graph.place_ids))
    shuffled = NeighborGraph(graph.place_ids[order], graph.neighbors[order])
    cuts = np.linspace(0, len(order), num_parts + 1).astype(int)
    parts = [
        write_graph_part(uri, i, shuffled.take(slice(int(cuts[i]), int(cuts[i + 1]))))
        for i in range(num_parts)
    ]
    publish_graph(uri, parts, graph.neighbors.shape[1])
    return uri


@pytest.mark.parametrize("max_pairs", [400, 1_000_000])
def test_a_plan_on_the_cluster_is_the_plan_of_one_process(
    ray_cluster: None, tmp_path: Path, max_pairs: int
) -> None:
    region = draw_city(1500, 3)
    graph = geographic_graph(region, 24)
    uri = publish_in_parts(str(tmp_path / "graph"), graph, 3)
    # the graph holds places without pairs too
    known = np.delete(np.arange(1500), np.arange(5, 1500, 7))
    places = Places(region.ids[known], region.lat[known], region.lon[known])
    pairs = draw_pairs(places, 4)
    named = np.random.default_rng(0).choice(places.ids, (2, 300))
    options: dict[str, Any] = {
        "batch_size": 16,
        "num_hard_negatives": 12,
        "neighbor_pool_size": 20,
        "seed": 9,
        "epoch": 2,
        "exclusions": Exclusions(places, PlacePairs.from_arrays(named[0], named[1]), 40.0),
        "max_pairs_per_cell": max_pairs,
    }
    cluster = plan_cells_on_cluster(pairs, uri, places, **options)
    here = plan_cells(pairs, CompactGraph.from_graph(graph, places.ids, 20), places, **options)
    assert np.array_equal(cluster.batches, here.batches)
    assert cluster.stats == here.stats
    assert cluster.stats.hardness > 1
    assert (cluster.stats.num_cells > 3) == (max_pairs == 400)


def test_a_plan_without_a_graph_is_made_on_the_cluster_too(ray_cluster: None) -> None:
    places = draw_city(300, 1)
    pairs = draw_pairs(places, 1)
    options: dict[str, Any] = {"batch_size": 8, "seed": 0, "epoch": 0, "max_pairs_per_cell": 100}
    cluster = plan_cells_on_cluster(pairs, None, places, **options)
    here = plan_cells(pairs, None, places, **options)
    assert np.array_equal(cluster.batches, here.batches)


def test_an_altered_part_of_the_graph_stops_the_plan_with_its_name(
    ray_cluster: None, tmp_path: Path
) -> None:
    places = draw_city(300, 1)
    uri = publish_in_parts(str(tmp_path / "graph"), geographic_graph(places, 4), 2)
    with (tmp_path / "graph" / "part-00001.parquet").open("ab") as file:
        file.write(b"more")
    with pytest.raises(RunError, match=r"part-00001\.parquet differs from the published file"):
        plan_cells_on_cluster(
            PairTable(*[places.ids] * 3),
            uri,
            places,
            batch_size=8,
            seed=0,
            epoch=0,
            max_pairs_per_cell=100,
        )


def test_a_cell_that_runs_out_of_memory_is_reported_with_the_key_to_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(references: list[Any]) -> None:
        raise OutOfMemoryError("the node was low on memory\nread more elsewhere")  # type: ignore[no-untyped-call]

    monkeypatch.setattr(ray, "get", die)
    with pytest.raises(
        RunError, match=r"low on memory; resume, with a lower sampling\.max_pairs_per_cell"
    ) as caught:
        get_cancelling([])
    assert "elsewhere" not in str(caught.value)
