"""Encode, decode and restore the state of optimiser and gradient scaler in a checkpoint."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from s4g_ray.errors import RunError, first_line

State = dict[str, Any]
REMEDY = (
    "resume with the version of s4g-ray that wrote it, or from another checkpoint:"
    " --resume --from-epoch N"
)


def encode_state(state: Mapping[str, Any]) -> bytes:
    """Return a state as the bytes of torch.save."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def decode_state(data: bytes, source: str) -> State:
    """Load the bytes of encode_state into the memory of the CPU, whatever device they came from.

    The optimiser moves each tensor to the device of its parameter. source: the origin of the bytes,
    for messages. Raises RunError for bytes that are no file of torch, and for those that hold more
    than tensors and plain values.
    """
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises errors of many kinds
        raise RunError(f"{source} {_describe(error)} and was not loaded; {REMEDY}") from error
    if not isinstance(state, dict):
        raise RunError(
            f"{source} holds a {type(state).__name__}, not a state of optimiser and scaler;"
            f" {REMEDY}"
        )
    return state


def _describe(error: Exception) -> str:
    """Return what is wrong with bytes that torch refuses."""
    # torch names the first object that it would have to call, in a message of many lines
    named = re.search(r"nsupported (?:global: )?GLOBAL ([\w.]+)", str(error))
    if named:
        return f"holds more than tensors and plain values ({named[1]})"
    reason = str(error).partition("WeightsUnpickler error:")[2] or first_line(error)
    reason = reason.strip().partition("\n")[0]
    return (
        "holds the bytes that were published, but no state that torch can read"
        f" ({type(error).__name__}: {reason})"
    )


def restore_state(
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    source: str,
) -> None:
    """Restore the state of an optimiser and of a gradient scaler.

    Moments and step counts are the checkpoint's; learning rate, weight decay and all other settings
    stay as the optimiser was made with. The scaler keeps its initial scale where the state was
    written without one (fp16 is new), and takes none where it is disabled. Raises RunError as
    check_state_fits.
    """
    if not {"optimizer", "scaler"} <= state.keys():
        raise RunError(f"{source} holds no state of optimiser and scaler; {REMEDY}")
    saved = state["optimizer"]
    check_state_fits(saved, optimizer, source)
    groups = [
        {**own, "params": old["params"]}
        for own, old in zip(optimizer.param_groups, saved["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    _adopt_layout(optimizer)
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def _adopt_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay out each moment as its parameter is: fused optimisers read both in one order."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                moments[name] = torch.empty_like(parameter).copy_(value)


def check_state_fits(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, source: str
) -> None:
    """Raise RunError where an optimiser's state is that of another optimiser or other parameters.

    saved: what the optimiser's state_dict() returned. source: its file, for messages.
    """
    fault = _find_fault(saved, optimizer)
    if fault is not None:
        raise RunError(
            f"{source} does not fit the optimiser of this configuration: {fault}. The checkpoint is"
            " whole: resume with the keys of model and train that it was written with (config.yaml"
            " in the run folder), or start a new run from its weights (s4g export, then"
            " model.pretrained)"
        )


def _find_fault(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str | None:
    """Return the first difference between a state and an optimiser; None where it fits."""
    old_sizes = [len(group["params"]) for group in saved["param_groups"]]
    own_sizes = [len(group["params"]) for group in optimizer.param_groups]
    if old_sizes != own_sizes:
        return (
            f"its groups have {_join(old_sizes)} parameters, those of the optimiser have"
            f" {_join(own_sizes)}"
        )
    for own, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        # a version of torch adds settings or drops some; another optimiser does both
        foreign = sorted(old.keys() - own.keys())
        lacking = sorted(own.keys() - old.keys())
        if foreign and lacking:
            name = type(optimizer).__name__
            return (
                f"it has the settings {', '.join(foreign)} and lacks {', '.join(lacking)} of {name}"
            )
        for number, parameter in zip(old["params"], own["params"], strict=True):
            for name, value in saved["state"].get(number, {}).items():
                is_moment = isinstance(value, Tensor) and value.dim() > 0
                if is_moment and value.shape != parameter.shape:
                    return (
                        f"{name} of parameter {number} has shape {list(value.shape)}, the parameter"
                        f" has {list(parameter.shape)}"
                    )
    return None


def _join(sizes: list[int]) -> str:
    return " + ".join(map(str, sizes)) or "no"
