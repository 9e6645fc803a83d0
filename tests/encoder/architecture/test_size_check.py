"""Sizes of images are checked against the model, before a run writes anything."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.architecture.size_check import fit_model_to_sizes
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.errors import InputError
from s4g_ray.pipeline.run import run
from s4g_ray.pipeline.stages.embed import embed_collection
from s4g_ray.pipeline.stages.evaluate import evaluate
from tests.conftest import tiny_config
from tests.encoder.test_backbones import images

Size = tuple[int, int]
SMALL_BEIT: dict[str, Any] = {"depth": 1, "embed_dim": 24}


def fit(name: str, query: Size, reference: Size, **values: Any) -> ModelConfig:
    options = values.pop("options", {})
    data = DataConfig(uri="x", query_size=query, reference_size=reference, **values)
    return fit_model_to_sizes(ModelConfig(name=name, pretrained=False, options=options), data)


@pytest.mark.parametrize(
    ("name", "query", "reference"),
    [
        ("test_convnext", (37, 81), (32, 32)),
        ("test_vit", (32, 128), (64, 64)),
        ("vit_small_patch14_dinov2", (112, 616), (378, 378)),
    ],
)
def test_sizes_that_a_model_takes_change_nothing(name: str, query: Size, reference: Size) -> None:
    assert fit(name, query, reference) == ModelConfig(name=name, pretrained=False)


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [
        ("test_vit", (100, 300), (96, 304)),
        ("vit_small_patch14_dinov2", (384, 384), (378, 378)),
        ("swin_tiny_patch4_window7_224", (122, 300), (120, 300)),
    ],
)
def test_a_size_that_patches_do_not_divide_is_refused_with_the_nearest(
    name: str, size: Size, nearest: Size
) -> None:
    options: dict[str, Any] = {"depths": [1, 1, 1, 1]} if "swin" in name else {"depth": 1}
    with pytest.raises(InputError) as caught:
        fit(name, size, (224, 224), options=options)
    message = str(caught.value)
    assert message.startswith(f"data.query_size={list(size)} does not fit {name}: ")
    assert "divi" in message
    assert message.endswith(f"the nearest size that fits is {list(nearest)}")
    assert "reference_size" not in message
    assert fit(name, nearest, (224, 224), options=options).options == options


def test_the_nearest_size_is_the_nearest_of_all() -> None:
    """Oracle: all sizes around."""
    encoder = Encoder.build(ModelConfig(name="test_vit", pretrained=False)).eval()
    around = [
        (abs(height - 37) + abs(width - 54), (height, width))
        for height in range(28, 46)
        for width in range(45, 63)
        if height % 16 == 0 and width % 16 == 0
    ]
    nearest = min(around)[1]
    with torch.inference_mode():
        assert encoder.embed(images(1, nearest), "queries").shape == (1, 64)
    with pytest.raises(InputError) as caught:
        fit("test_vit", (37, 54), (32, 32))
    assert str(caught.value).endswith(f"the nearest size that fits is {list(nearest)}")


def test_the_size_within_the_field_of_view_counts() -> None:
    fit("test_vit", (32, 128), (32, 32), query_fov_deg=180)
    fit("test_vit", (32, 128), (32, 32), query_fov_deg=90)
    wanted = r"query_size=\[32, 128\], of which query_fov_deg=100 leaves \[32, 36\], does not fit"
    with pytest.raises(InputError, match=wanted):
        fit("test_vit", (32, 128), (32, 32), query_fov_deg=100)


def test_a_model_built_for_one_size_is_built_for_the_configured_one() -> None:
    name = "beit_base_patch16_224"
    fitted = fit(name, (64, 96), (64, 96), options=SMALL_BEIT)
    assert fitted.options == {**SMALL_BEIT, "img_size": [64, 96]}
    assert fit(name, (64, 96), (64, 96), options=fitted.options) == fitted  # as on resume
    with torch.inference_mode():
        encoder = Encoder.build(fitted).eval()
        assert encoder.embed(images(1, (64, 96)), "queries").shape == (1, encoder.dim)
    assert fit(name, (224, 224), (224, 224), options=SMALL_BEIT).options == SMALL_BEIT
    with pytest.raises(InputError, match=r"(?s)query_size.*to one size.*\n.*reference_size.*"):
        fit(name, (64, 96), (64, 64), options=SMALL_BEIT)
    with pytest.raises(InputError, match=r"nearest size that fits is \[64, 96\], of queries and"):
        fit(name, (65, 97), (65, 97), options=SMALL_BEIT)
    with pytest.raises(InputError, match=r"change it, or model\.options"):
        fit(name, (96, 96), (96, 96), options=fitted.options)


def test_a_patch_that_leaves_a_rest_is_refused_where_the_model_would_crop_it() -> None:
    wanted = "its patches of 16x16 pixels do not divide it"
    options: dict[str, Any] = {"img_size": [40, 40], "depth": 1}
    with pytest.raises(InputError, match=wanted):
        fit("vit_tiny_patch16_224", (40, 40), (40, 40), options=options)
    padded = {"dynamic_img_size": True, "dynamic_img_pad": True}
    assert fit("test_vit", (40, 40), (40, 44), options=padded).options == padded


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "resnet10t", "test_efficientnet"])
def test_shapes_without_data_fail_exactly_where_a_forward_pass_fails(name: str) -> None:
    encoder = Encoder.build(ModelConfig(name=name, pretrained=False)).eval()
    for size in ((8, 64), (16, 16), (33, 48), (64, 80)):
        is_fitting = True
        with torch.inference_mode():
            try:
                encoder.embed(images(1, size), "references")
            except (AssertionError, RuntimeError):
                is_fitting = False
        expected = nullcontext() if is_fitting else pytest.raises(InputError, match="nearest size")
        with expected:
            fit(name, size, size)


def test_models_that_need_data_are_built_with_random_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = Encoder.build
    devices = []

    def refuse_meta(cfg: ModelConfig, *, weights: bool) -> Encoder:
        devices.append(torch.get_default_device().type)
        if devices[-1] == "meta":
            raise NotImplementedError("no data")
        return build(cfg, weights=weights)

    monkeypatch.setattr(Encoder, "build", refuse_meta)
    fit("test_convnext", (32, 32), (32, 32))
    assert devices == ["meta", "cpu"]


def test_a_run_and_its_stages_refuse_a_size_before_they_write_anything(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    model: dict[str, Any] = {"name": "test_vit", "pretrained": False}
    data: dict[str, Any] = {"query_size": (40, 40), "reference_size": (32, 32)}
    config = tiny_config(tmp_path / "run", synthetic.uri, model=model, data=data)
    weights = tmp_path / "w.pth"
    torch.save(Encoder.build(config.model).state_dict(), weights)
    wanted = r"data\.query_size=\[40, 40\] does not fit test_vit"
    with pytest.raises(InputError, match=wanted):
        run(config)
    with pytest.raises(InputError, match=wanted):
        embed_collection(str(weights), synthetic.uri, str(tmp_path / "table"), config=config)
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match=wanted):
        evaluate(str(weights), synthetic.uri, config=config, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]
