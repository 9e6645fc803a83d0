"""A model that timm cannot give is one message, before Ray is started and a folder is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s4g_ray.config.loading import override_config
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError
from s4g_ray.pipeline import driver
from s4g_ray.pipeline.run import run
from tests.conftest import tiny_config

FAILURES = {
    "unknown model": (["model.name=convnext_bose"], r"model\.name='convnext_bose'.*convnext_base"),
    "unknown tag": (
        ["model.name=convnext_tiny.fb_in22"],
        r"model\.name='convnext_tiny\.fb_in22'.*similar: convnext_tiny\.fb_in22k",
    ),
    "unknown option": (
        ["model.options={drop_pat_rate: 0.1}"],
        r"model\.options\.drop_pat_rate: .* has no such keyword; it has .*drop_path_rate",
    ),
    "option of another kind": (
        ["model.options={depths: [1]}"],
        r"model\.options=.*cannot be built so|model\.options\.depths",
    ),
    "no checkpointing": (
        ["model.name=vgg11", "model.grad_checkpointing=true", "model.options={}"],
        r"model\.grad_checkpointing=true, but vgg11 has none",
    ),
    "sizes": (
        ["model.name=test_vit", "data.query_size=[40, 40]", "data.reference_size=[40, 40]"],
        r"data\.query_size=\[40, 40\] does not fit test_vit",
    ),
    "not pooled": (
        ["model.name=resnet10t", "model.options={global_pool: ''}"],
        r"ResNet gives \[1, 512, .*global_pool=avg",
    ),
    "stages": (["model.freeze=99"], r"model\.freeze=99 exceeds"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_timm_is_one_message_before_a_folder_is_made(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    overrides, message = FAILURES[name]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(driver, "ray_session", refuse)
    config = override_config(tiny_config(tmp_path / "run", synthetic.uri), overrides)
    with pytest.raises(InputError, match=message):
        run(config)
    assert not (tmp_path / "run").exists()
