"""The encoder, its weights in all published forms, and its numerics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.config.loading import load_config
from s4g_ray.config.training_schema import ModelConfig, TrainConfig
from s4g_ray.encoder.checkpoint import load_encoder, save_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics, Precision, measure_numerics, numerics_choices
from s4g_ray.encoder.pretrained import load_pretrained, rename_efficientnet
from s4g_ray.encoder.weights import encode_weights, load_weights
from s4g_ray.errors import InputError
from s4g_ray.storage.files import resolve_package

TINY = ModelConfig(name="test_convnext", pretrained=False)
EARTH = load_config(Path(__file__).parents[2] / "configs/earth.yaml")


def images(count: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def test_building_is_seeded_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    a = Encoder.build(TINY, seed=1)
    b = Encoder.build(TINY, seed=1)
    c = Encoder.build(TINY, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert encode_weights(a) == encode_weights(b) != encode_weights(c)


def test_both_views_in_one_call_equal_each_alone_and_use_the_models_mean_and_std() -> None:
    encoder = Encoder.build(TINY).eval()
    with torch.inference_mode():
        q, r, scale = encoder(images(3), images(2, (32, 48)))
        data: Any = encoder.model.pretrained_cfg
        mean, std = (torch.tensor(data[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
        by_hand = encoder.model((images(3) / 255.0 - mean) / std)
        q_same, r_same, _ = encoder(images(3), images(3))
        q_fewer, r_more, _ = encoder(images(3), images(5))
        five = encoder.embed(images(5), "references")
    torch.testing.assert_close(q, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q_same, r_same)
    torch.testing.assert_close(q_fewer, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(r_more, five)
    assert r.shape == (2, encoder.dim)
    assert scale.item() == pytest.approx(1 / 0.07)


def test_weights_round_trip_exactly_and_strictly() -> None:
    encoder = Encoder.build(TINY, seed=1)
    other = Encoder.build(TINY, seed=2)
    data = encode_weights(encoder)
    load_weights(other, data, "x")
    assert encode_weights(other) == data
    state = safetensors.torch.load(data)
    first, second = list(state)[:2]
    del state[first]
    state["extra"] = torch.zeros(1)
    state[second] = torch.zeros(1, 2, 3)
    with pytest.raises(InputError) as caught:
        load_weights(other, safetensors.torch.save(state), "x.safetensors")
    for part in (
        "x.safetensors",
        f"missing {first}",
        "unexpected extra",
        f"{second} has shape [1, 2, 3]",
    ):
        assert part in str(caught.value)


def test_packaged_efficientnet_weights_load_under_timm_names() -> None:
    """Renamed keys must carry the right tensor: compare with the order of definition."""
    encoder = Encoder.build(EARTH.model)
    assert isinstance(EARTH.model.pretrained, str)
    state = torch.load(resolve_package(EARTH.model.pretrained), weights_only=True)
    by_order = list(state.values())
    ours = encoder.model.state_dict()
    assert len(ours) == len(by_order) - 2
    for (name, value), wanted in zip(ours.items(), by_order, strict=False):
        assert torch.equal(value, wanted), name


def test_weights_that_do_not_fit_are_refused_with_the_keys(tmp_path: Path) -> None:
    encoder = Encoder.build(TINY)
    torch.save({"stem.0.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"missing .* and \d+ more \(\d+\); unexpected .* \(1\)|of another shape"
    ):
        load_pretrained(encoder, str(tmp_path / "w.pth"))
    for content in ([1, 2], {"a": "text"}, {}, {0: torch.zeros(1)}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(InputError, match="not a state dict"):
            load_pretrained(encoder, str(tmp_path / "w.pth"))
    for junk in (b"junk", b""):
        (tmp_path / "w.pth").write_bytes(junk)
        with pytest.raises(InputError, match="not a readable state dict"):
            load_pretrained(encoder, str(tmp_path / "w.pth"))
    with pytest.raises(InputError, match=r"none\.pth"):
        load_pretrained(encoder, str(tmp_path / "none.pth"))
    with pytest.raises(InputError, match=r"model\.name='convnext_bose'"):
        Encoder.build(ModelConfig(name="convnext_bose", pretrained=False))


def test_a_file_that_would_run_code_when_unpickled_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "it-ran",)

    torch.save({"logit_scale": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not a readable state dict"):
        load_pretrained(Encoder.build(TINY), str(tmp_path / "w.pth"))
    assert not (tmp_path / "it-ran").exists()


def published_state(seed: int) -> dict[str, torch.Tensor]:
    """Return a state dict as the published code saves it: `model.*` and a scalar logit_scale."""
    torch.manual_seed(seed)
    backbone = timm.create_model("test_convnext", num_classes=0)
    state = {"logit_scale": torch.ones([]) * 3.25}
    for key, value in backbone.state_dict().items():
        state[f"model.{key}"] = torch.randn_like(value)
    return state


def test_published_weights_load_completely_with_their_temperature(tmp_path: Path) -> None:
    state = published_state(5)
    torch.save(state, tmp_path / "published.pth")
    encoder = Encoder.build(
        ModelConfig(name="test_convnext", pretrained=str(tmp_path / "published.pth"))
    )
    assert encoder.logit_scale.item() == 3.25
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, state[f"model.{key}"])


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_published_weights_that_do_not_fit_are_refused_with_the_keys(
    tmp_path: Path, fault: str
) -> None:
    state = published_state(5)
    last = list(state)[-1]
    wanted = f"missing {last}"
    if fault == "missing":
        del state[last]
    elif fault == "unexpected":
        state["model.head.extra"] = torch.zeros(2)
        wanted = r"unexpected model\.head\.extra"
    elif fault == "shape":
        state[last] = torch.zeros(1, 2, 3)
        wanted = rf"{last} has shape \[1, 2, 3\]"
    torch.save(state, tmp_path / "published.pth")
    with pytest.raises(InputError, match=wanted):
        Encoder.build(ModelConfig(name="test_convnext", pretrained=str(tmp_path / "published.pth")))


def test_a_saved_state_dict_with_a_classifier_loads_into_the_backbone(tmp_path: Path) -> None:
    model = timm.create_model("test_convnext", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        encoder = Encoder.build(TINY)
        load_pretrained(encoder, str(tmp_path / name))
        assert all(
            torch.equal(v, model.state_dict()[k]) for k, v in encoder.model.state_dict().items()
        )


def test_blocks_beyond_the_architecture_are_renamed_too() -> None:
    renamed = rename_efficientnet({"_blocks.5._bn1.weight": torch.zeros(1)}, [1, 2])
    assert list(renamed) == ["blocks.2.5.bn1.weight"]


def test_frozen_batch_norms_keep_their_statistics_in_training() -> None:
    encoder = Encoder.build(EARTH.model, weights=False).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items() if "running" in k}
    encoder(images(2), images(2))
    assert before
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in before.items())


def test_preprocessing_hash_follows_size() -> None:
    encoder = Encoder.build(TINY)
    sizes = [DataConfig(uri="x", query_size=(32, w), reference_size=(32, 32)) for w in (32, 64)]
    assert encoder.preprocessing(sizes[0]) != encoder.preprocessing(sizes[1])


def test_numerics_choices_are_those_that_the_configuration_allows(tmp_path: Path) -> None:
    train = TrainConfig(precision="auto", channels_last="auto", batch_size=4)
    assert len(numerics_choices(train)) == 4
    fixed = TrainConfig(precision="bf16", channels_last=True)
    assert numerics_choices(fixed) == [Numerics("bf16", channels_last=True)]
    save_checkpoint(str(tmp_path / "c"), Encoder.build(TINY, seed=4), None, epoch=0, step=0)
    loaded = load_encoder(TINY, str(tmp_path / "c"))
    assert encode_weights(loaded) == encode_weights(Encoder.build(TINY, seed=4))
    measured = measure_numerics(TINY, train, (32, 32), str(tmp_path / "c"), "cpu")
    assert {numerics for numerics, _ in measured} == set(numerics_choices(train))
    assert all(speed > 0 for _, speed in measured)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_and_channels_last_embed_nearly_the_same(precision: Precision) -> None:
    encoder = Encoder.build(TINY, seed=1).eval()
    with torch.inference_mode():
        plain = Numerics().embed(encoder, images(), "queries")
        fast = Numerics(precision, channels_last=True)
        fast.prepare(encoder)
        other = fast.embed(encoder, images(), "queries").float()
        cosine = torch.nn.functional.cosine_similarity(plain, other)
    assert cosine.min() > 0.99


def test_checkpointed_activations_give_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        cfg = TINY.model_copy(update={"grad_checkpointing": checkpointing})
        encoder = Encoder.build(cfg, seed=1).train()
        loss = encoder.embed(images(), "queries").square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in encoder.model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, checkpointed)
