"""Backbones of today's families: the width they give, sizes of images, options and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from s4g_ray.config.loading import dump_config, override_config, parse_config
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.encoder.architecture.backbone import run_without_data
from s4g_ray.encoder.architecture.head import Head, measure_width
from s4g_ray.encoder.checkpoint import load_encoder, save_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.errors import InputError

# timm's num_features is not the width of the output of those marked so
WIDTHS = {
    "test_convnext": 64,
    "test_vit": 64,
    "test_efficientnet": 256,
    "resnet10t": 512,
    "efficientvit_m0": 192,
    "mobilenetv3_small_050": 1024,  # num_features: 288
    "mobilenetv4_conv_small_035": 1280,  # 336
    "ghostnet_050": 1280,  # 480
    "efficientvit_b0": 1280,  # 128
    "hgnetv2_b0": 2048,  # 1024
}
# small members of the families of vision transformers, and a size that each takes
TRANSFORMERS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "vit_tiny_patch16_224": ({"depth": 2}, (64, 96)),
    "vit_small_patch14_reg4_dinov2": ({"depth": 1}, (56, 98)),
    "vit_small_patch16_dinov3": ({"depth": 1}, (64, 96)),
    "vit_base_patch16_siglip_224": ({"depth": 1, "embed_dim": 96, "num_heads": 4}, (64, 96)),
    "vit_base_patch16_siglip_gap_224": ({"depth": 1, "embed_dim": 96, "num_heads": 4}, (64, 96)),
    "eva02_tiny_patch14_224": ({"depth": 2}, (56, 98)),
    "swin_tiny_patch4_window7_224": ({"depths": [2, 1, 1, 1], "embed_dim": 24}, (64, 96)),
    "swinv2_tiny_window8_256": ({"depths": [2, 1, 1, 1], "embed_dim": 24}, (64, 96)),
}


def build(name: str, **model: Any) -> Encoder:
    cfg = ModelConfig(name=name, pretrained=False, **model)
    return Encoder.build(cfg, seed=1).eval()


def images(count: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", WIDTHS)
def test_dim_is_the_width_of_the_embeddings(name: str) -> None:
    encoder = build(name)
    assert encoder.dim == WIDTHS[name]
    with torch.inference_mode():
        assert encoder.embed(images(1, (64, 64)), "queries").shape == (1, WIDTHS[name])


class Unusual(nn.Module):
    """A model that cannot be run without data, and whose training mode must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 7)
        self.normal = nn.BatchNorm1d(7)
        self.factor = torch.ones(1)  # not a buffer, so it does not move

    def forward(self, x: Tensor) -> Tensor:
        mean = x.float().mean((2, 3)) + (self.factor * float(x.sum())).to(x.device)
        return self.normal(self.layer(mean))  # type: ignore[no-any-return]


def test_a_model_that_needs_data_is_measured_with_data_and_keeps_its_modes() -> None:
    model = Unusual()
    model.layer.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert measure_width(model, Head(), (32, 32)) == 7
    assert [module.training for module in model.modules()] == [True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_measuring_takes_no_data_and_agrees_with_a_forward_pass() -> None:
    encoder = build("test_convnext", shared=False)
    queries, references, scale = run_without_data(encoder, (32, 64), (48, 48))
    assert queries.is_meta
    assert queries.shape == references.shape == (1, 64)
    assert not scale.shape
    assert not any(parameter.is_meta for parameter in encoder.parameters())


def test_an_output_that_is_not_pooled_is_refused() -> None:
    with pytest.raises(InputError, match=r"ResNet gives \[1, 512, 6, 6\] .*global_pool=avg"):
        build("resnet10t", options={"global_pool": ""})


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_take_rectangles_of_two_sizes_with_one_backbone(name: str) -> None:
    """Oracle: a model that timm builds for each size, with the weights as timm converts them."""
    options, size = TRANSFORMERS[name]
    encoder = build(name, options=options)
    other = (2 * size[0], size[0])
    queries = images(2, size)
    references = images(1, other)
    with torch.inference_mode():
        found = encoder(queries, references)
        again = encoder(queries, references)
        for view, batch in enumerate((queries, references)):
            torch.testing.assert_close(found[view], again[view])
            wanted = embed_with_timm(encoder, name, options, batch)
            torch.testing.assert_close(found[view], wanted, rtol=1e-3, atol=1e-4)
    loss = encoder(queries, references)[0].square().sum() + encoder(queries, references)[1].sum()
    loss.backward()
    unused = [key for key, value in encoder.model.named_parameters() if value.grad is None]
    assert not unused  # DDP refuses them


def embed_with_timm(encoder: Encoder, name: str, options: dict[str, Any], batch: Tensor) -> Tensor:
    """Embed with a timm model that is built for the size of the batch."""
    size = tuple(batch.shape[2:])
    keywords: dict[str, Any] = {**options, "img_size": size}
    if "swin" in name:  # else small windows would be chosen for small images
        keywords["window_size"] = 8 if "window8" in name else 7
        keywords["always_partition"] = True
    model: Any = timm.create_model(name, num_classes=0, **keywords).eval()
    state = encoder.model.state_dict()
    if "pos_embed" in state:
        old: Tensor = state["pos_embed"]
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        grid = round((old.shape[1] - prefix) ** 0.5)
        square = old[:, prefix:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(
            square, model.patch_embed.grid_size, mode="bicubic", antialias=True
        )
        state["pos_embed"] = torch.cat([old[:, :prefix], resized.flatten(2).mT], dim=1)
    model.load_state_dict(state)
    return model((batch - encoder.mean) / encoder.std)  # type: ignore[no-any-return]


def test_options_reach_the_model() -> None:
    encoder = build("test_vit", options={"drop_path_rate": 0.5, "img_size": [32, 48]})
    assert encoder.model.blocks[-1].drop_path1.drop_prob == 0.5  # type: ignore[index, union-attr]
    assert encoder.model.patch_embed.img_size == (32, 48)  # type: ignore[union-attr]
    assert encoder.model.pos_embed.shape[1] == 1 + 2 * 3  # type: ignore[index]
    pooled = build("test_vit", options={"global_pool": "avg"})
    assert pooled.model.global_pool == "avg"


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "convformer_s18", "regnetx_002"])
def test_unknown_options_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=rf"model\.options\.drop_paths: {name} .*has no such.*"):
        build(name, options={"drop_path_rate": 0.1, "drop_paths": 0.1})
    with pytest.raises(InputError, match=r"it has .*\bdrop_path_rate\b"):
        build("test_convnext", options={"drop_paths": 0.1})


def test_options_with_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"model\.options=.*'embed_dim': 65.* cannot be built"):
        build("test_vit", options={"embed_dim": 65})
    with pytest.raises(InputError, match=r"options\.depths: poolformer_s12 sets it by itself"):
        build("poolformer_s12", options={"depths": [1, 1, 1, 1]})
    with pytest.raises(InputError, match=r"model\.name='con:vnext'"):
        build("con:vnext")


def test_the_section_model_refuses_what_the_encoder_sets_and_keeps_options_in_yaml() -> None:
    tree: dict[str, Any] = {"run_dir": "r", "data": {"uri": "d"}}
    options = {"img_size": [32, 48], "drop_path_rate": 0.1, "global_pool": "avg", "flag": True}
    config = parse_config({**tree, "model": {"options": options}})
    assert config.model.options == options
    assert override_config(config, ["seed=1"]).model.options == options
    assert "img_size" in dump_config(config)
    assert override_config(config, ["model.options.depth=3"]).model.options["depth"] == 3
    for fault, wanted in (
        ({"options": {"num_classes": 3}}, r"options\.num_classes is set by"),
        ({"options": {"checkpoint_path": "x"}}, r"set by model\.pretrained"),
        ({"head": "linear"}, "head=linear needs embedding_dim"),
        ({"embedding_dim": 8}, "embedding_dim=8 needs head=linear"),
        ({"head": "gem", "embedding_dim": 8}, "head=gem keeps the width"),
    ):
        with pytest.raises(InputError, match=wanted):
            parse_config({**tree, "model": fault})


def test_weights_of_another_size_load_with_their_position_embeddings_resampled(
    tmp_path: Path,
) -> None:
    torch.manual_seed(3)
    source: Any = timm.create_model("test_vit", num_classes=5, img_size=96)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    cfg = ModelConfig(name="test_vit", pretrained=str(tmp_path / "w.pth"))
    for options, grid in (({}, (10, 10)), ({"img_size": [32, 64]}, (2, 4))):
        encoder = Encoder.build(cfg.model_copy(update={"options": options}))
        state = encoder.model.state_dict()
        for key, value in source.state_dict().items():
            if key != "pos_embed" and not key.startswith("head."):
                assert torch.equal(state[key], value), key
        square = source.pos_embed[:, 1:].reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
        wanted = torch.nn.functional.interpolate(square, grid, mode="bicubic", antialias=True)
        torch.testing.assert_close(state["pos_embed"][:, 1:], wanted.flatten(2).mT)
        assert torch.equal(state["pos_embed"][:, :1], source.pos_embed[:, :1])


def test_weights_of_a_whole_encoder_load_into_one_of_another_size(tmp_path: Path) -> None:
    small = build("test_vit", options={"img_size": [64, 64]})
    safetensors.torch.save_file(small.state_dict(), tmp_path / "w.safetensors")
    large = ModelConfig(
        name="test_vit",
        pretrained=str(tmp_path / "w.safetensors"),
        options={"img_size": [96, 128]},
        shared=False,
    )
    encoder = Encoder.build(large)
    for backbone in encoder.backbones:
        state = backbone.state_dict()
        assert state["pos_embed"].shape[1] == 1 + 6 * 8
        for key, value in small.model.state_dict().items():
            if key != "pos_embed":
                assert torch.equal(state[key], value), key


def test_weights_in_the_form_of_their_authors_load(tmp_path: Path) -> None:
    """DINOv2's own names: a mask token, which timm's model does not have."""
    options: dict[str, Any] = {"depth": 1}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **options)
    state = {**model.state_dict(), "mask_token": torch.zeros(1, 384)}
    torch.save(state, tmp_path / "w.pth")
    cfg = ModelConfig(
        name="vit_small_patch14_dinov2", pretrained=str(tmp_path / "w.pth"), options=options
    )
    loaded = Encoder.build(cfg).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_a_checkpoint_of_a_model_with_options_loads(tmp_path: Path) -> None:
    cfg = ModelConfig(
        name="test_vit", pretrained=False, options={"img_size": [32, 48]}, shared=False
    )
    encoder = Encoder.build(cfg, seed=4)
    save_checkpoint(str(tmp_path / "c"), encoder, None, epoch=0, step=0)
    assert encode_weights(load_encoder(cfg, str(tmp_path / "c"))) == encode_weights(encoder)
