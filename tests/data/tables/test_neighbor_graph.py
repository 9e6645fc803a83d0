from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.errors import RunError
from s4g_ray.storage.manifest import Stamp


def test_a_saved_graph_loads_with_its_pads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s4g_ray.data.tables.neighbor_graph.PAIRS_PER_BLOCK", 6)
    stamp = Stamp(
        step=1, weights_sha256="a", preprocessing="p", dataset="d", dim=4, dtype="float32"
    )
    neighbors = np.array([[7, 9, -1], [-1, -1, -1], [3, 7, 5]])
    scores = np.array([[0.9, 0.1, -np.inf], [-np.inf] * 3, [3, 2, 1]], dtype=np.float32)
    NeighborGraph(np.array([5, 7, 9]), neighbors, scores).save(str(tmp_path / "g"), stamp=stamp)
    graph = NeighborGraph.load(str(tmp_path / "g"), stamp=stamp)
    assert np.array_equal(graph.neighbors, neighbors)
    assert graph.scores is not None
    assert np.array_equal(graph.scores, scores)
    assert len(list((tmp_path / "g").glob("*.parquet"))) == 2
    other = Stamp(
        step=2, weights_sha256="a", preprocessing="p", dataset="d", dim=4, dtype="float32"
    )
    with pytest.raises(RunError, match="step 1, but 2 is wanted"):
        NeighborGraph.load(str(tmp_path / "g"), stamp=other)


def test_impossible_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match="its own neighbors"):
        NeighborGraph(np.array([1, 2]), np.array([[2], [2]]))
    with pytest.raises(ValueError, match="repeats a place"):
        NeighborGraph(np.array([1, 1]), np.array([[2], [3]]))
    with pytest.raises(ValueError, match="shape"):
        NeighborGraph(np.array([1, 2]), np.array([[2]]))
