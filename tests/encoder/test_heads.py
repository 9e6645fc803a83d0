"""Heads, an encoder for each view, frozen stages, and exports of all of these."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor

from s4g_ray.config.loading import dump_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.data.image_table import VIEWS
from s4g_ray.encoder.architecture import head as heads
from s4g_ray.encoder.architecture.head import GeMHead
from s4g_ray.encoder.checkpoint import epoch_uri, load_encoder, save_checkpoint
from s4g_ray.encoder.embedding.encode_batches import BatchEncoder
from s4g_ray.encoder.embedding.outcomes import EncodingJob
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.export import export
from s4g_ray.encoder.precision import Numerics
from s4g_ray.encoder.source import open_source
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.errors import InputError
from s4g_ray.storage.manifest import open_published
from tests.conftest import tiny_config
from tests.encoder.test_backbones import build, images


def config(**model: Any) -> ModelConfig:
    return ModelConfig(**{"name": "test_convnext", "pretrained": False, **model})


@pytest.mark.parametrize(
    "name",
    [
        "test_convnext",
        "test_efficientnet",
        "resnet10t",
        "mobilenetv3_small_050",
        "hgnetv2_b0",
        "swin_tiny_patch4_window7_224",
        "levit_128s",
        "beit_base_patch16_224",
    ],
)
def test_gem_with_exponent_1_is_the_average_that_it_replaces(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the model's own output. Negative values count, as they do in an average."""
    monkeypatch.setattr(heads, "SMALLEST", -1e9)
    options: dict[str, Any] = {}
    if "beit" in name:
        options = {"depth": 1, "embed_dim": 96}
    if "swin" in name:
        options = {"depths": [1, 1, 1, 1], "embed_dim": 24}
    encoder = build(name, head="gem", options=options)
    plain = build(name, options=options)
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if k != "head.p"})
    encoder.head.p.data.fill_(1.0)  # type: ignore[operator]
    size = (224, 224) if name in ("beit_base_patch16_224", "levit_128s") else (96, 64)
    with torch.inference_mode():
        found = encoder.embed(images(1, size), "queries")
        wanted = plain.embed(images(1, size), "queries")
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "vit_base_patch16_siglip_224"])
def test_gem_replaces_the_class_token_and_attention_pooling(name: str) -> None:
    encoder = build(name, head="gem", options={"depth": 1, "embed_dim": 96, "num_heads": 4})
    batch = images(2, (64, 96))
    model: Any = encoder.model
    tokens: Tensor = model.forward_features((batch - encoder.mean) / encoder.std)
    patches = tokens[:, model.num_prefix_tokens :]
    assert patches.shape[1] == 4 * 6
    wanted = (patches.clamp(min=1e-6) ** 3).mean(1) ** (1 / 3)
    found = encoder.embed(batch, "references")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found.sum().backward()  # type: ignore[no-untyped-call]
    unused = [k for k, p in encoder.named_parameters() if p.grad is None]
    assert unused == ["logit_scale"]


def test_gem_does_not_overflow_in_half_precision() -> None:
    features = torch.full((1, 4, 2, 2), 60.0, dtype=torch.float16)
    pooled = GeMHead().pool(features, (2, 3))
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled.float(), torch.full((1, 4, 1, 1), 60.0), rtol=1e-2, atol=0)


def test_gem_is_refused_where_the_pooling_cannot_be_replaced() -> None:
    wanted = (
        "pooling of PoolingVisionTransformer, 'token', cannot be replaced: .*choose another head"
    )
    with torch.device("meta"), pytest.raises(InputError, match=wanted):
        build("pit_ti_224", head="gem")
    wanted = "model.head=gem: CrossVit has no feature map or patch tokens .*choose another head"
    with torch.device("meta"), pytest.raises(InputError, match=wanted):
        build("crossvit_9_240", head="gem")


def test_a_linear_head_maps_the_backbones_output() -> None:
    encoder = build("mobilenetv3_small_050", head="linear", embedding_dim=24)
    batch = images(2, (64, 64))
    with torch.inference_mode():
        pooled = encoder.model((batch - encoder.mean) / encoder.std)
        state = encoder.state_dict()
        wanted = pooled @ state["head.projection.weight"].T + state["head.projection.bias"]
        found = encoder.embed(batch, "queries")
    assert (encoder.dim, tuple(found.shape)) == (24, (2, 24))
    torch.testing.assert_close(found, wanted)
    again = build("mobilenetv3_small_050", head="linear", embedding_dim=24)
    assert encode_weights(encoder) == encode_weights(again)  # seeded


def test_by_default_the_state_dict_is_that_of_the_backbone_and_the_scale() -> None:
    names = [
        f"model.{key}" for key in timm.create_model("test_convnext", num_classes=0).state_dict()
    ]
    assert list(Encoder.build(config()).state_dict()) == ["logit_scale", *names]


@pytest.mark.parametrize("head", [{}, {"head": "gem"}, {"head": "linear", "embedding_dim": 8}])
def test_views_that_share_nothing_begin_alike_and_get_their_own_gradients(
    head: dict[str, Any],
) -> None:
    encoder = Encoder.build(config(shared=False, **head), seed=1).eval()
    one = images(2, (32, 32))
    with torch.inference_mode():
        assert torch.equal(encoder.embed(one, "queries"), encoder.embed(one, "references"))
    with torch.no_grad():
        for parameter in encoder.reference_model.parameters():
            parameter.add_(0.1)
    queries, references, scale = encoder(one, one)
    torch.testing.assert_close(queries, encoder.embed(one, "queries"))
    torch.testing.assert_close(references, encoder.embed(one, "references"))
    assert (queries - references).abs().max() > 1e-3
    queries.sum().backward()
    gradients = {k for k, p in encoder.named_parameters() if p.grad is not None}
    assert gradients == {
        k for k in dict(encoder.named_parameters()) if k.startswith(("model", "head"))
    }
    references.sum().backward()
    scale.backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    embedded = Numerics("bf16").embed(encoder, one, "references").float()
    cosine = torch.nn.functional.cosine_similarity(embedded, references)
    assert cosine.min() > 0.99


def test_an_embedding_actor_takes_the_backbone_of_the_view(tmp_path: Path) -> None:
    cfg = config(shared=False)
    encoder = Encoder.build(cfg, seed=3).eval()
    torch.nn.init.normal_(encoder.reference_model.get_parameter("stem.0.weight"))
    checkpoint = str(tmp_path / "c")
    save_checkpoint(checkpoint, encoder, None, epoch=0, step=0)
    sha256 = open_published(checkpoint, "checkpoint").info["weights_sha256"]
    job = SimpleNamespace(checkpoint=checkpoint, weights_sha256=sha256, numerics=Numerics())
    actor = BatchEncoder(cfg, torch.device("cpu"))
    actor.load(cast(EncodingJob, job))
    batch = images(3, (32, 32))
    found = {}
    for view in VIEWS:
        found[view] = torch.from_numpy(actor.collect([actor.embed(Numerics(), batch, view)]))
        with torch.inference_mode():
            wanted = torch.nn.functional.normalize(encoder.embed(batch, view), dim=1)
        torch.testing.assert_close(found[view], wanted, rtol=1e-4, atol=1e-5)
    assert (found["queries"] - found["references"]).abs().max() > 0.01


def test_weights_of_a_shared_encoder_load_into_both_backbones(tmp_path: Path) -> None:
    shared = Encoder.build(config(head="linear", embedding_dim=8), seed=5)
    torch.save(shared.state_dict(), tmp_path / "whole.pth")
    torch.save(shared.model.state_dict(), tmp_path / "bare.pth")
    for name in ("whole", "bare"):
        cfg = config(
            pretrained=str(tmp_path / f"{name}.pth"),
            shared=False,
            head="linear",
            embedding_dim=8,
        )
        encoder = Encoder.build(cfg)
        for backbone in encoder.backbones:
            for key, value in shared.model.state_dict().items():
                assert torch.equal(backbone.state_dict()[key], value)
        if name == "whole":
            for head in (encoder.head, encoder.reference_head):
                state = head.state_dict()
                assert all(torch.equal(state[k], v) for k, v in shared.head.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        {"shared": False, "head": "linear", "embedding_dim": 8},
        {"name": "test_vit", "head": "gem", "options": {"img_size": [32, 48]}},
    ],
)
def test_an_export_and_its_weights_file_describe_the_whole_encoder(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    run, target = tmp_path / "run", tmp_path / "export"
    made = tiny_config(run, "data", model={"name": "test_convnext", "pretrained": False, **model})
    encoder = Encoder.build(made.model, seed=2)
    write_run(made, encoder)
    description = export(str(run), str(target))
    assert description == json.loads((target / "model.json").read_text())
    for key, value in model.items():
        assert description["architecture" if key == "name" else key] == value
    assert description["dim"] == encoder.dim
    for source in (target, target / "model.pth", target / "model.safetensors"):
        opened = open_source(str(source), "data")
        assert encode_weights(opened.build_encoder(opened.config.model)) == encode_weights(encoder)


def write_run(made: RunConfig, encoder: Encoder) -> None:
    """Write a run's folder with a checkpoint, as training does."""
    save_checkpoint(epoch_uri(made.run_dir, 1), encoder, None, epoch=1, step=3)
    folder = Path(made.run_dir)
    (folder / "config.yaml").write_text(dump_config(made))
    (folder / "run.json").write_text(json.dumps({"dataset": {"name": "d"}}))
    assert encode_weights(load_encoder(made.model, epoch_uri(made.run_dir, 1))) == encode_weights(
        encoder
    )


def test_gradient_checkpointing_is_refused_where_a_model_has_none() -> None:
    cfg = ModelConfig(name="vgg11", pretrained=False, grad_checkpointing=True)
    wanted = "grad_checkpointing=true, but vgg11 has none .*set it to false"
    with torch.device("meta"), pytest.raises(InputError, match=wanted):
        Encoder.build(cfg)


@pytest.mark.parametrize(
    "model",
    [
        {"head": "gem"},
        {"head": "linear", "embedding_dim": 8, "shared": False},
        {"freeze": 2},
        {"freeze": 2, "name": "test_vit"},
        {"name": "test_efficientnet", "freeze": 1},
    ],
)
def test_checkpointed_activations_give_the_same_gradients_with_heads_and_frozen_stages(
    model: dict[str, Any],
) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = Encoder.build(config(grad_checkpointing=checkpointing, **model), seed=1).train()
        queries, references, scale = encoder(images(2, (32, 32)), images(2, (32, 64)))
        loss = (queries.square().sum() + references.sum()) * scale
        loss.backward()
        gradients.append({key: value.grad for key, value in encoder.named_parameters()})
        trained = {key for key, value in encoder.named_parameters() if value.requires_grad}
        assert {key for key, value in gradients[-1].items() if value is not None} == trained
    torch.testing.assert_close(gradients[0], gradients[1])
