from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.tables.neighbor_graph import publish_graph, write_graph_part
from s4g_ray.errors import RunError
from s4g_ray.mining.carried_rows import CarryPlan, read_carried
from s4g_ray.mining.job_plan import parts_of
from tests.mining.test_overlap import random_graph


def test_carried_parts_are_joined_up_to_the_wanted_size(tmp_path: Path) -> None:
    graph = random_graph(list(range(1200)), 8, 0)
    uri = str(tmp_path)
    parts = [write_graph_part(uri, n, graph.take(slice(200 * n, 200 * n + 200))) for n in range(6)]
    publish_graph(uri, parts, 8)
    mined = np.concatenate([np.arange(200), np.arange(200, 1200, 2)])  # all of the first part
    part_mb = 1.1 * parts[0].num_bytes / 1e6
    plan = CarryPlan.from_graph(uri, mined, part_mb, 4)
    assert [row["number"] for row in plan.rows] == [4, 5]
    joined = [[part.name for part in parts_of(row)] for row in plan.rows]
    assert joined == [[p.name for p in parts[1:4]], [p.name for p in parts[4:]]]
    assert (plan.k, plan.num_places) == (8, 500)
    carried = read_carried(uri, parts[2], mined, 8)
    assert carried.place_ids.tolist() == list(range(401, 600, 2))
    assert carried.neighbors.tolist() == graph.neighbors[401:600:2].tolist()
    assert CarryPlan.from_graph(uri, np.arange(1200), part_mb, 0).rows == []
    (tmp_path / parts[5].name).unlink()
    with pytest.raises(RunError, match=r"part-00005\.parquet is in the manifest but missing"):
        CarryPlan.from_graph(uri, mined, part_mb, 4)
