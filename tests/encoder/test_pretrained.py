"""Weights from elsewhere: prefixes, classifiers, refused objects, and what does not fit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.pretrained import load_pretrained, read_state
from s4g_ray.errors import InputError

TINY = ModelConfig(name="test_convnext", pretrained=False)
# a small member of each of ten families, and options that make it smaller
FAMILIES: dict[str, dict[str, Any]] = {
    "test_convnext": {},
    "test_vit": {},
    "test_efficientnet": {},
    "resnet10t": {},
    "swin_tiny_patch4_window7_224": {"depths": [1, 1, 1, 1], "embed_dim": 24},
    "mobilenetv4_conv_small_035": {},
    "levit_128s": {},  # two classifiers
    "repvit_m0_9": {},  # head.head.l, head.head_dist.l
    "densenet121": {"block_config": [1, 1, 1, 1]},
    "deit_tiny_distilled_patch16_224": {"depth": 1},
}

PREFIXES = (
    "module.",
    "_orig_mod.",
    "backbone.",
    "encoder.",
    "model.",
    "module._orig_mod.",
    "_orig_mod.module.backbone.",
    "module.model.encoder.",
)


def random_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Fill a model's state with values that no other model has."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: torch.rand(value.shape, generator=generator).to(value.dtype)
        for key, value in model.state_dict().items()
    }


def save(path: Path, state: Any) -> str:
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bare_timm_state_dict_loads_without_its_classifier(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in FAMILIES[name].items()
    }
    with torch.random.fork_rng():
        whole = timm.create_model(name, num_classes=3, **options)
        bare = timm.create_model(name, num_classes=0, **options)
    state = random_state(whole)
    uri = save(tmp_path / "w.pth", {f"module._orig_mod.{key}": v for key, v in state.items()})
    lines: list[str] = []
    cfg = ModelConfig(name=name, pretrained=uri, options=FAMILIES[name])
    encoder = Encoder.build(cfg, report=lines.append)
    loaded = encoder.model.state_dict()
    assert loaded.keys() == bare.state_dict().keys()
    for key, value in loaded.items():
        assert torch.equal(value, state[key]), key
    dropped = [key for key in state if key not in loaded]
    assert dropped
    assert lines == [
        f"model.pretrained={uri!r}: took the prefix 'module._orig_mod.' off all {len(state)} keys",
        f"model.pretrained={uri!r}: dropped the classifier: {', '.join(dropped[:4])}"
        + (f" and {len(dropped) - 4} more" if len(dropped) > 4 else ""),
    ]


@pytest.mark.parametrize(
    ("form", "prefix"),
    [
        (form, prefix)
        for form in ("backbone", "classifier beside it", "published", "with a scale")
        for prefix in PREFIXES
        if (form, prefix) != ("with a scale", "model.")  # the published form
    ],
)
def test_a_common_prefix_is_taken_off_and_reported(tmp_path: Path, prefix: str, form: str) -> None:
    encoder = Encoder.build(TINY, seed=1)
    own = random_state(encoder.model)
    scale = torch.tensor(2.5)
    state = {f"{prefix}{key}": value for key, value in own.items()}
    if form == "classifier beside it":
        state |= {"head.weight": torch.zeros(3, 64), "fc.bias": torch.zeros(3)}
    elif form == "published":
        state = {f"{prefix}model.{key}": value for key, value in own.items()}
        state[f"{prefix}logit_scale"] = scale
    elif form == "with a scale":
        state["logit_scale"] = scale
    lines: list[str] = []
    before = encoder.logit_scale.item()
    load_pretrained(encoder, save(tmp_path / "w.pth", state), lines.append)
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, own[key]), key
    has_scale = form in ("published", "with a scale")
    assert encoder.logit_scale.item() == (2.5 if has_scale else before)
    text = "\n".join(lines)
    assert f"took the prefix {prefix!r} off all" in text
    assert ("a classifier: head.weight, fc.bias" in text) == (form == "classifier beside it")
    says_so = "has no logit_scale" in text
    assert says_so == (not has_scale and "model." in prefix)


def test_weights_in_their_own_form_are_loaded_without_a_word(tmp_path: Path) -> None:
    encoder = Encoder.build(TINY, seed=1)
    lines: list[str] = []
    for state in (random_state(encoder.model), random_state(encoder)):
        load_pretrained(encoder, save(tmp_path / "w.pth", state), lines.append)
    assert lines == []


def test_a_prefix_of_a_part_of_the_keys_is_not_taken_off(tmp_path: Path) -> None:
    encoder = Encoder.build(TINY, seed=1)
    state = {f"module.{key}": value for key, value in random_state(encoder.model).items()}
    state["momentum_encoder.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"unexpected module\..* and \d+ more"):
        load_pretrained(encoder, save(tmp_path / "w.pth", state))


def test_faults_are_shown_by_kind_with_counts(tmp_path: Path) -> None:
    encoder = Encoder.build(TINY, seed=1)
    state = random_state(encoder)
    keys = [key for key in state if key != "logit_scale"]
    missing = keys[:6]
    for key in missing:
        del state[key]
    state["model.extra"] = torch.zeros(1)
    for key in keys[6:8]:
        state[key] = torch.zeros(1, 2, 3)
    with pytest.raises(InputError) as caught:
        load_pretrained(encoder, save(tmp_path / "w.pth", state))
    text = str(caught.value)
    assert f"{len(encoder.state_dict())} tensors (9 faults; is model.name right?): " in text
    assert f"missing {', '.join(missing[:4])} and 2 more (6); unexpected model.extra (1); " in text
    shape = list(encoder.state_dict()[keys[6]].shape)
    wanted = f"of another shape (2): {keys[6]} has shape [1, 2, 3], {shape} is expected, {keys[7]} "
    assert wanted in text


class Elsewhere:
    """A class of the user's own code."""


@pytest.mark.parametrize("zipped", [True, False])
def test_classes_that_are_not_loaded_are_named(tmp_path: Path, zipped: bool) -> None:
    value = {"state_dict": {"a": torch.zeros(1)}, "args": argparse.Namespace(), "x": Elsewhere()}
    torch.save(value, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="not a readable state dict: not tensors alone") as caught:
        read_state(str(tmp_path / "w.pth"))
    assert "argparse.Namespace" in str(caught.value)
    if zipped:
        assert f"{__name__}.Elsewhere" in str(caught.value)


def test_keys_of_a_training_checkpoint_are_named_with_the_entry_to_save(tmp_path: Path) -> None:
    state = {"epoch": 3, "state_dict": {"a": torch.zeros(1)}, "optimizer": {}}
    uri = save(tmp_path / "w.pth", state)
    with pytest.raises(InputError) as caught:
        read_state(uri)
    wanted = "its keys are epoch, state_dict, optimizer; save 'state_dict' alone: torch.save("
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("convnext_bose", "convnext_base"),
        ("resnet5", "resnet50"),
        ("dinov3_vit_small", "vit_small_patch16_dinov3"),
        ("convnext_tiny.fb_in22", "convnext_tiny.fb_in22k"),
        ("zzzz", "none"),
    ],
)
def test_an_unknown_model_is_refused_with_the_nearest_names(name: str, similar: str) -> None:
    with pytest.raises(InputError, match=rf"model\.name='{name}'.*; similar: .*{similar}"):
        Encoder.build(ModelConfig(name=name, pretrained=False))
