from __future__ import annotations

import pytest

from s4g_ray.mining.candidates import REASONS
from s4g_ray.mining.report import Counts, MiningReport


@pytest.mark.parametrize(
    ("neighbors", "dropped", "warning"),
    [
        (1, {"max_score": 999}, None),
        (0, {"own": 50, "near": 3, "max_score": 1200}, r"mining.max_score dropped 1,200 candidat"),
        (0, {"own": 50, "near": 9}, r"sampling.exclude_radius_m dropped 9 candidates; loosen it"),
        (0, {"own": 50}, r"there are no references of other places"),
    ],
)
def test_a_graph_without_neighbors_names_the_filter_to_loosen(
    neighbors: int, dropped: dict[str, int], warning: str | None
) -> None:
    counts = Counts(neighbors=neighbors, dropped=tuple(dropped.get(name, 0) for name in REASONS))
    report = MiningReport.from_counts(
        counts, 5, has_previous=False, without_embedding=0, seconds=1.0, reused_parts=0
    )
    if warning is None:
        assert report.warning is None
    else:
        assert report.warning is not None
        assert report.warning.startswith("warning: no place has a neighbor: ")
        assert warning in report.warning
