"""Frozen stages, and the layers of parameters for layer-wise learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.encoder.architecture.parameter_groups import is_norm_or_bias, layer_of_parameters
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.errors import InputError
from tests.encoder.test_backbones import build, images

# the layer of a parameter and its name, of architectures that name their parts differently
LAYERS = {
    "test_convnext": {
        "model.stem.0.weight": 0,
        "model.stages.0.blocks.0.gamma": 1,
        "model.stages.1.downsample.1.weight": 2,
        "model.stages.3.blocks.1.mlp.fc2.bias": 9,
        "model.head.norm.weight": 10,
        "logit_scale": 10,
    },
    "test_vit": {
        "model.cls_token": 0,
        "model.pos_embed": 0,
        "model.patch_embed.proj.weight": 0,
        "model.blocks.0.norm1.weight": 1,
        "model.blocks.5.mlp.fc2.bias": 6,
        "model.norm.weight": 6,  # timm counts it to the last block
        "logit_scale": 7,
    },
    "resnet10t": {
        "model.conv1.0.weight": 0,
        "model.layer1.0.conv1.weight": 1,
        "model.layer4.0.bn2.bias": 4,
        "logit_scale": 5,
    },
    "mobilenetv3_small_050": {
        "model.conv_stem.weight": 0,
        "model.blocks.0.0.conv_dw.weight": 1,
        "model.conv_head.weight": 13,
        "logit_scale": 13,
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_rise_from_the_stem_to_the_head(name: str) -> None:
    encoder = build(name)
    found = layer_of_parameters(encoder)
    assert found.keys() == dict(encoder.named_parameters()).keys()
    assert {key: found[key] for key in LAYERS[name]} == LAYERS[name]
    assert set(found.values()) == set(range(max(found.values()) + 1))


def test_both_backbones_and_all_heads_have_layers() -> None:
    encoder = build("test_vit", shared=False, head="linear", embedding_dim=4)
    found = layer_of_parameters(encoder)
    assert found.keys() == dict(encoder.named_parameters()).keys()
    for key, layer in found.items():
        if key.startswith("model."):
            assert found[f"reference_{key}"] == layer
    assert found["head.projection.bias"] == found["reference_head.projection.bias"] == 7


def test_a_model_without_named_stages_is_refused() -> None:
    with torch.device("meta"):
        encoder = build("poolformer_s12")
    with pytest.raises(InputError, match=r"does not tell the stages of MetaFormer"):
        layer_of_parameters(encoder)


def test_norms_biases_and_single_values_are_told_from_weights() -> None:
    encoder = build("test_vit", head="gem")
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    wanted = {"logit_scale", "head.p"}
    for name, module in encoder.model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            if isinstance(module, norms) or leaf == "bias":
                wanted.add(f"model.{name}.{leaf}")
    found = {key for key, value in encoder.named_parameters() if is_norm_or_bias(key, value)}
    assert found == wanted
    assert is_norm_or_bias("layer.bias", torch.zeros(2, 2))
    assert is_norm_or_bias("blocks.0.gamma", torch.zeros(2))
    assert not is_norm_or_bias("bias.weight", torch.zeros(2, 2))


FROZEN: list[tuple[dict[str, Any], set[str], set[str]]] = [
    ({"name": "test_convnext", "freeze": 2}, {"stem", "stages.0", "stages.1"}, {"stages.2"}),
    (
        {"name": "test_vit", "freeze": 1},
        {"cls_token", "pos_embed", "patch_embed", "blocks.0"},
        {"blocks.1", "norm"},
    ),
    ({"name": "resnet10t", "freeze": 1}, {"conv1", "bn1", "layer1"}, {"layer2", "layer4"}),
]


@pytest.mark.parametrize(("model", "frozen", "trained"), FROZEN)
@pytest.mark.parametrize("shared", [True, False])
def test_leading_stages_do_not_train(
    model: dict[str, Any], frozen: set[str], trained: set[str], shared: bool
) -> None:
    cfg = ModelConfig(pretrained=False, freeze_batch_norm=False, shared=shared, **model)
    encoder = Encoder.build(cfg, seed=1).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    queries, references, scale = encoder(images(4, (64, 64)), images(4, (64, 64)))
    (queries.square().sum() * scale + references.pow(3).sum()).backward()
    optimizer.step()
    changed = {
        key for key, value in encoder.state_dict().items() if not torch.equal(value, before[key])
    }
    assert "logit_scale" in changed
    for prefix in ["model"] if shared else ["model", "reference_model"]:
        for part in frozen:  # running statistics of batch norms included
            assert not {key for key in changed if f"{key}.".startswith(f"{prefix}.{part}.")}, part
        for part in trained:
            assert {key for key in changed if f"{key}.".startswith(f"{prefix}.{part}.")}, part


def test_more_stages_than_there_are_and_models_without_stages_are_refused() -> None:
    assert build("test_convnext", freeze=4)
    with pytest.raises(InputError, match=r"model\.freeze=5 exceeds the 4 stages .*test_convnext"):
        build("test_convnext", freeze=5)
    with pytest.raises(InputError, match=r"model\.freeze=7 exceeds the 6 stages or blocks"):
        build("test_vit", freeze=7)
    with torch.device("meta"), pytest.raises(InputError, match=r"set model\.freeze=0"):
        build("poolformer_s12", freeze=1)
