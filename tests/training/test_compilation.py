"""torch.compile of the backbones: the same weights and steps, or a message and none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training.compilation import compile_backbones
from tests.support.step_batches import CPU, PAIRS, assert_close, encoder, make_batch, step

DATA = DataConfig(uri="data", query_size=(32, 32), reference_size=(32, 32))


def compile_eagerly(backbone: nn.Module) -> None:
    """Trace and run as without a compiler: what is tested is not torch's code generation."""
    backbone._compiled_call_impl = torch.compile(backbone._call_impl, backend="eager")


def test_a_compiled_encoder_has_the_same_names_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    model = encoder("test_resnet")
    names = list(model.state_dict())
    assert compile_backbones(model, Numerics(), DATA, PAIRS, CPU) is None
    assert model.model._compiled_call_impl is not None
    assert list(model.state_dict()) == names
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_close(step(model, make_batch()), step(encoder("test_resnet"), make_batch()))


def test_an_encoder_that_does_not_compile_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler\nat all")

    def compile_in_vain(backbone: nn.Module) -> None:
        backbone._compiled_call_impl = fail

    monkeypatch.setattr(nn.Module, "compile", compile_in_vain)
    model = encoder()
    reason = compile_backbones(model, Numerics(), DATA, PAIRS, CPU)
    assert reason == "RuntimeError: no compiler"
    assert_close(step(model, make_batch()), step(encoder(), make_batch()))
