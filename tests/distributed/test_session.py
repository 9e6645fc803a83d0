"""A session of Ray ends with its block."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from s4g_ray.config.schema import RayConfig
from s4g_ray.distributed import session
from s4g_ray.storage.s3_settings import StorageConfig


def test_no_later_call_of_ray_starts_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    hook: Any = ray._private.auto_init_hook
    starts: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(hook, "enable_auto_connect", True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: starts.append("ray.init"))
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with session.ray_session(RayConfig(), StorageConfig()) as nodes:
        assert nodes == []
    hook.auto_init_ray()  # as a thread of a round in progress does by ray.get
    assert starts == ["ray.init"]
