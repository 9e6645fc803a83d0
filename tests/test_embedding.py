from __future__ import annotations

import pytest

from s4g_ray.embedding import warm_rate


def test_the_warm_rate_adds_what_each_actor_did_from_its_first_part_to_its_last() -> None:
    rows = [
        {"actor": "a", "images": 100, "started": 0.0, "finished": 1.0},
        {"actor": "a", "images": 100, "started": 3.0, "finished": 4.0},
        {"actor": "b", "images": 60, "started": 10.0, "finished": 12.0},
    ]
    assert warm_rate(rows) == pytest.approx(200 / 4 + 60 / 2)
