from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.evaluation.top_references import find_top_references


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_top_of_parts_is_that_of_a_plain_sort(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are small whole numbers, so that many scores are equal and none is rounded."""
    monkeypatch.setattr("s4g_ray.evaluation.top_references.QUERIES_AT_ONCE", 4)
    monkeypatch.setattr("s4g_ray.evaluation.top_references.ROWS_AT_ONCE", 6)
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, (9, 3)).astype(np.float32)
    gallery = rng.integers(-2, 3, (30, 3)).astype(np.float32)
    wanted = [
        sorted(range(30), key=lambda row: (-float(query @ gallery[row]), row))[:count]
        for query in queries
    ]
    parts = [gallery[:7], gallery[7:7], gallery[7:20], gallery[20:]]
    assert find_top_references(queries, parts, count).tolist() == wanted
