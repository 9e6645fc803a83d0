from __future__ import annotations

import dataclasses

import pytest

from s4g_ray.errors import RunError
from s4g_ray.index.plan import plan_index
from s4g_ray.index.sharded.update import check_reserved


def test_a_version_far_beyond_the_reserved_memory_is_refused() -> None:
    before = plan_index(10**6, 1024, kind="flat")
    grown = dataclasses.replace(before, num_vectors=2 * 10**6, memory_gb=2 * before.memory_gb)
    check_reserved(dataclasses.replace(before, memory_gb=1.2 * before.memory_gb), before.peak_gb)
    check_reserved(grown, 0.0)
    with pytest.raises(
        RunError, match=r"of 2,000,000 vectors needs up to 25\.1 GB a shard, but 12"
    ):
        check_reserved(grown, before.peak_gb)
