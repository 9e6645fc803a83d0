"""Load and save the weights of an encoder as state dicts.

Loading is strict: every key and every shape must fit. Reads the published forms of weights too.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage

StateDict = Mapping[str, Tensor]
WEIGHTS = "model.safetensors"  # in a checkpoint


def encode_weights(encoder: nn.Module) -> bytes:
    """Return the encoder's weights, `model.*` and `logit_scale` ..., as safetensors bytes."""
    return encode_state_dict(encoder.state_dict())


def encode_state_dict(state: StateDict) -> bytes:
    """Return a state dict as safetensors bytes."""
    return safetensors.torch.save(
        {key: value.detach().cpu().contiguous() for key, value in state.items()}
    )


def check_finite(state: StateDict, what: str, remedy: str) -> None:
    """Raise RunError when a weight or buffer is not finite: the count, and the first one's name.

    what: names the weights in the message; remedy: ends it. Costs one pass over the weights where
    they lie, and one wait for the device: 0.02 s for 88 million weights on one core, where
    `isfinite().all()`, which writes a mask of them, takes 0.21 s.
    """
    tensors = {
        name: value.detach()
        for name, value in state.items()
        if value.is_floating_point() and value.numel()
    }
    # the extremes of a tensor are NaN where one of its values is
    extremes = [torch.stack(torch.aminmax(value)).double() for value in tensors.values()]
    if not extremes or bool(torch.stack(extremes).isfinite().all()):
        return
    counts = {name: int((~value.isfinite()).sum()) for name, value in tensors.items()}
    bad = {name: count for name, count in counts.items() if count}
    first = next(iter(bad))
    raise RunError(
        f"{what} are not finite: {sum(bad.values())} values in {len(bad)} of {len(tensors)}"
        f" tensors, first {first}; they are not published. {remedy}"
    )


def load_weights(encoder: nn.Module, data: bytes, source: str) -> None:
    """Load the bytes of encode_weights into an encoder.

    source: the bytes' origin, for messages. Raises InputError for other bytes, and for keys and
    shapes that do not fit: it lists them.
    """
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"{source} is not a safetensors file: {error}") from error
    _load_strictly(encoder, state, source)


def load_pretrained(encoder: nn.Module, uri: str) -> None:
    """Load a state dict: of a whole encoder in the published form, or of a bare timm backbone.

    The published form has the backbone's keys under `model.` and `logit_scale` beside them; all of
    it is loaded. From a backbone's state dict, classifier weights are dropped, and keys of the
    EfficientNet-PyTorch family are renamed to timm's. An encoder with a backbone for each view
    loads weights without `reference_model.` into both. Weights of other sizes of images, and those
    in the form of their authors, are converted as timm converts them (position embeddings are taken
    as those of a square, unless they count the patches of the architecture's own size).

    Raises InputError when the file is missing, and for keys and shapes that do not fit: it lists
    them.
    """
    state = read_state(uri)
    source = f"model.pretrained={uri!r}"
    backbones = {"model.": encoder.get_submodule("model")}
    if any(key.startswith("reference_model.") for key in encoder.state_dict()):
        backbones["reference_model."] = encoder.get_submodule("reference_model")
    if "logit_scale" in state or all(key.startswith("model.") for key in state):
        whole = _copy_to_references(state) if len(backbones) > 1 else dict(state)
        for prefix, backbone in backbones.items():
            own = {key: value for key, value in whole.items() if key.startswith(prefix)}
            converted = convert_to_backbone(
                backbone, {key.removeprefix(prefix): value for key, value in own.items()}
            )
            rest = {key: value for key, value in whole.items() if key not in own}
            whole = {**rest, **{f"{prefix}{key}": value for key, value in converted.items()}}
        _load_strictly(encoder, whole, source)
        return
    for backbone in backbones.values():
        _load_strictly(backbone, convert_to_backbone(backbone, state), source)


def _copy_to_references(state: StateDict) -> dict[str, Tensor]:
    """Add the weights of references to those of an encoder whose views share them."""
    if any(key.startswith("reference_") for key in state):
        return dict(state)
    copies = {
        f"reference_{key}": value
        for key, value in state.items()
        if key.startswith(("model.", "head."))
    }
    return {**state, **copies}


def convert_to_backbone(backbone: nn.Module, state: StateDict) -> StateDict:
    """Return a backbone's state dict with timm's names and the shapes of this backbone.

    Drops classifier weights. Returns a state dict that cannot be converted with its own names and
    shapes.
    """
    model: Any = backbone
    if any(key.startswith("_blocks.") for key in state):
        state = rename_efficientnet(state, [len(stage) for stage in model.blocks])
    state = _drop_classifier(model, state)
    module = sys.modules[type(backbone).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)  # timm's, for downloaded weights
    if convert is None or _fits(backbone, state):
        return state
    try:
        converted = _drop_classifier(model, convert(dict(state), backbone))
    except Exception:  # of many kinds: it is made for its own architectures' weights
        return state
    return converted if _fits(backbone, converted) else state


def _drop_classifier(model: Any, state: StateDict) -> dict[str, Tensor]:
    """Return a state dict without the weights of a classifier, which the backbone does not have.

    Also without those of attention pooling, where the backbone pools otherwise.
    """
    named = model.pretrained_cfg.get("classifier") or ()
    names = ["classifier", "head.fc", "fc", "attn_pool"]
    names.extend([named] if isinstance(named, str) else named)
    prefixes = tuple(f"{name}." for name in names)
    expected = model.state_dict()
    return {
        key: value
        for key, value in state.items()
        if key in expected or not key.startswith(prefixes)
    }


def _fits(module: nn.Module, state: StateDict) -> bool:
    """Return whether a state dict has the module's keys and shapes."""
    return not _list_faults(module, state)


def read_state(uri: str) -> StateDict:
    """Read the tensors of a .safetensors or .pth file; a .pth with torch.load(weights_only=True).

    uri: the file, or the folder of an export. Raises InputError when the file is missing, or is no
    state dict.
    """
    path = files.resolve_package(files.absolute(uri))
    if files.exists(files.join(path, WEIGHTS)):  # an export's folder
        path = files.join(path, WEIGHTS)
    try:
        data = files.read_bytes(path)
    except OSError as error:
        reraise_outage(error)
        raise InputError(f"cannot read weights: {error}") from error
    try:
        if path.endswith(".safetensors"):
            state: Any = safetensors.torch.load(data)
        else:
            state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # both libraries raise errors of many kinds for a damaged file
        reason = f"damaged, or not tensors alone ({type(error).__name__}); only those are loaded"
        raise InputError(f"{uri}: not a readable state dict: {reason}") from error
    found = f"it is a {type(state).__name__}"
    if isinstance(state, Mapping):
        if state and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
            return dict(state)
        found = f"its keys are {', '.join(map(str, list(state)[:5]))}"
    raise InputError(
        f"{uri}: not a state dict, which has a tensor for each name: {found}; save the state dict"
        " alone"
    )


def rename_efficientnet(state: StateDict, depths: list[int]) -> dict[str, Tensor]:
    """Rename the keys of EfficientNet-PyTorch to timm's.

    Example: `_blocks.7._bn0.weight` becomes `blocks.3.1.bn1.weight`.

    depths: the number of blocks of each timm stage.
    """
    blocks = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    separable = {
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn1",
        "_project_conv": "conv_pw",
        "_bn2": "bn2",
    }
    inverted = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if match:
            number = int(match[1])
            layer = match[2]
            leaf = match[3]
            names = inverted if f"_blocks.{number}._expand_conv.weight" in state else separable
            unknown = (len(depths), number)  # of a block that timm lacks: it keeps its number
            stage, i = blocks[number] if number < len(blocks) else unknown
            renamed[f"blocks.{stage}.{i}.{names.get(layer, layer)}.{leaf}"] = value
        else:
            layer, _, leaf = key.partition(".")
            renamed[f"{outer.get(layer, layer)}.{leaf}"] = value
    return renamed


def _load_strictly(module: nn.Module, state: StateDict, source: str) -> None:
    """Load a state dict, or raise InputError with the first 10 keys that do not fit."""
    faults = _list_faults(module, state)
    if faults:
        shown = "; ".join(faults[:10])
        if len(faults) > 10:
            shown += f"; and {len(faults) - 10} more"
        raise InputError(
            f"{source} does not fit {type(module).__name__}, {len(module.state_dict())} tensors"
            f" ({len(faults)} faults; is model.name right?): {shown}"
        )
    module.load_state_dict(dict(state))


def _list_faults(module: nn.Module, state: StateDict) -> list[str]:
    """Return a text for each key and shape of a state dict that does not fit a module."""
    expected = module.state_dict()
    faults = [f"missing {key}" for key in expected if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in expected]
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            shape = list(state[key].shape)
            faults.append(f"{key} has shape {shape}, {list(value.shape)} is expected")
    return faults
