"""States of optimiser and scaler: their device, what they restore, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s4g_ray.encoder.training_state import decode_state, encode_state, restore_state
from s4g_ray.errors import RunError

Optimizer = torch.optim.Optimizer


pytestmark = pytest.mark.usefixtures("one_thread")


def make_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,))]


def train(optimizer: Optimizer, parameters: list[nn.Parameter], first: int, steps: int) -> None:
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def scaler(*, enabled: bool, scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)


def state_of(optimizer: Optimizer, *, scaled: bool = False) -> dict[str, Any]:
    saved = scaler(enabled=scaled, scale=64.0)
    return {"optimizer": optimizer.state_dict(), "scaler": saved.state_dict()}


def reload(state: dict[str, Any]) -> dict[str, Any]:
    return decode_state(encode_state(state), "state.pt")


def test_a_state_that_was_saved_on_a_gpu_is_loaded_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = torch.arange(6.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        data = encode_state({"optimizer": {"state": {0: {"exp_avg": moments}}}, "step": 3})
    assert b"cuda:0" in data
    state = decode_state(data, "state.pt")
    found = state["optimizer"]["state"][0]["exp_avg"]
    assert found.device == torch.device("cpu")
    assert torch.equal(found, moments)
    # otherwise torch takes the device of the tag, or refuses where there is none
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            torch.load(io.BytesIO(data), weights_only=True)


def test_what_torch_refuses_is_named_and_no_message_advises_to_remove_the_checkpoint() -> None:
    data = encode_state({"optimizer": torch.zeros(100)})
    faults = {
        encode_state({"optimizer": PurePosixPath("/")}): "plain values (pathlib.PurePosixPath)",
        data[: len(data) // 2]: "no state that torch can read (RuntimeError: PytorchStreamReader",
        b"no file of torch": "no state that torch can read (UnpicklingError: Unsupported operand",
        b"": "no state that torch can read (EOFError: EOFError)",
    }
    for content, message in faults.items():
        with pytest.raises(RunError) as caught:
            decode_state(content, "state.pt")
        assert str(caught.value).startswith("state.pt holds ")
        assert message in str(caught.value)
        assert str(caught.value).endswith("--resume --from-epoch N")
        assert "remove" not in str(caught.value)
    buffer = io.BytesIO()
    torch.save(torch.zeros(2), buffer)
    with pytest.raises(RunError, match=r"state\.pt holds a Tensor, not a state of optimiser"):
        decode_state(buffer.getvalue(), "state.pt")


def test_a_restored_optimiser_continues_bit_for_bit() -> None:
    whole = make_parameters()
    train(torch.optim.AdamW(whole, lr=0.1), whole, 0, 5)
    parts = make_parameters()
    first = torch.optim.AdamW(parts, lr=0.1)
    train(first, parts, 0, 3)
    second = torch.optim.AdamW(parts, lr=0.1)
    restore_state(reload(state_of(first)), second, scaler(enabled=False), "state.pt")
    train(second, parts, 3, 2)
    assert all(map(torch.equal, whole, parts))


def adamw(
    weights: Tensor, gradients: list[Tensor], *, lr: float, decays: list[float], eps: float = 1e-8
) -> Tensor:
    """AdamW as its paper gives it (Loshchilov and Hutter 2019, algorithm 2), in float64."""
    weights = weights.double()
    mean = torch.zeros_like(weights)
    square = torch.zeros_like(weights)
    for step, (gradient, decay) in enumerate(zip(gradients, decays, strict=True), 1):
        gradient = gradient.double()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        ratio = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + eps)
        weights = weights - lr * ratio - lr * decay * weights
    return weights


def test_a_restored_optimiser_keeps_the_settings_of_the_new_configuration() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    begun = parameter.detach().clone()
    gradients = [torch.tensor([0.3, -0.1, 2.0]) * number for number in (1, 2, 3)]
    first = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.5)
    for gradient in gradients[:2]:
        parameter.grad = gradient.clone()
        first.step()
    second = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.0)
    restore_state(reload(state_of(first)), second, scaler(enabled=False), "state.pt")
    parameter.grad = gradients[2].clone()
    second.step()
    wanted = adamw(begun, gradients, lr=0.01, decays=[0.5, 0.5, 0.0])
    torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("was_scaled", "is_scaled", "scale"),
    [(True, True, 64.0), (False, True, 1024.0), (True, False, 1.0), (False, False, 1.0)],
)
def test_the_scale_is_restored_where_both_use_fp16(
    was_scaled: bool, is_scaled: bool, scale: float
) -> None:
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters)
    train(optimizer, parameters, 0, 1)
    own = scaler(enabled=is_scaled)
    restore_state(reload(state_of(optimizer, scaled=was_scaled)), optimizer, own, "state.pt")
    assert own.get_scale() == scale


def test_a_state_that_does_not_fit_is_named_and_nothing_of_it_is_loaded() -> None:
    parameters = make_parameters()
    trained = torch.optim.AdamW(parameters)
    train(trained, parameters, 0, 1)
    state = reload(state_of(trained))
    weights = make_parameters()
    groups: list[dict[str, Any]] = [
        {"params": weights[:1]},
        {"params": weights[1:], "weight_decay": 0.0},
    ]
    turned = nn.Parameter(weights[0].detach().T.contiguous())
    others: dict[str, Optimizer] = {
        "its groups have 2 parameters, those of the optimiser have 1 + 1": torch.optim.AdamW(
            groups
        ),
        "exp_avg of parameter 0 has shape [3, 4], the parameter has [4, 3]": torch.optim.AdamW(
            [turned, weights[1]]
        ),
        "it has the settings amsgrad, betas": torch.optim.SGD(weights, lr=0.1),
    }
    for fault, optimizer in others.items():
        with pytest.raises(RunError) as caught:
            restore_state(state, optimizer, scaler(enabled=False), "state.pt")
        message = str(caught.value)
        assert message.startswith("state.pt does not fit the optimiser of this configuration: ")
        assert fault in message
        assert "The checkpoint is whole" in message
        assert "remove" not in message
        assert not optimizer.state_dict()["state"]
    with pytest.raises(RunError, match=r"state\.pt holds no state of optimiser and scaler"):
        restore_state({"lag": 0.5}, trained, scaler(enabled=False), "state.pt")


def test_moments_are_laid_out_in_memory_as_their_parameters_are() -> None:
    """A branch may choose another memory format; fused optimisers read raw memory in one order."""

    def train(steps: int, channels_last: bool, state: dict[str, Any] | None = None) -> Any:
        torch.manual_seed(1)
        layer = torch.nn.Conv2d(3, 4, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        if channels_last:
            layer.to(memory_format=torch.channels_last)
        if state is not None:
            layer.load_state_dict(state["weights"])
            restore_state(state, optimizer, scaler, "here")
        for number in range(steps):
            optimizer.zero_grad()
            torch.manual_seed(number)
            layer(torch.randn(2, 3, 6, 6)).square().mean().backward()
            optimizer.step()
        saved = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        return copy.deepcopy({**saved, "weights": layer.state_dict()})

    half = train(2, channels_last=False)
    wanted = train(3, channels_last=False, state=copy.deepcopy(half))["weights"]
    found = train(3, channels_last=True, state=copy.deepcopy(half))["weights"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
