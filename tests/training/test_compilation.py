"""torch.compile of the encoder: the same weights and steps, or a message and none."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training.compilation import compile_encoder
from tests.support.step_batches import CPU, PAIRS, assert_close, encoder, make_batch, step

DATA = DataConfig(uri="data", query_size=(32, 32), reference_size=(32, 32))


def test_a_compiled_encoder_has_the_same_names_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch, and run as without a compiler: torch's code generation is not ours."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = encoder("test_resnet")
    names = list(model.state_dict())
    assert compile_encoder(model, Numerics(), DATA, PAIRS, CPU) is None
    assert "embed" in vars(model)
    assert list(model.state_dict()) == names
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_close(step(model, make_batch()), step(encoder("test_resnet"), make_batch()))


def test_trying_to_compile_changes_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = encoder("test_resnet")
    model.freeze_batch_norm = False
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert compile_encoder(model, Numerics(), DATA, PAIRS, CPU) is None
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


def test_an_encoder_that_does_not_compile_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_in_vain(_: Any) -> Any:
        def fail(*_: object) -> None:
            raise RuntimeError("no compiler\nat all")

        return fail

    monkeypatch.setattr(torch, "compile", compile_in_vain)
    model = encoder()
    assert compile_encoder(model, Numerics(), DATA, PAIRS, CPU) == "RuntimeError: no compiler"
    assert model.embed.__func__ is Encoder.embed  # type: ignore[attr-defined]
    assert_close(step(model, make_batch()), step(encoder(), make_batch()))
