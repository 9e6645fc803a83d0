"""Load weights from elsewhere: of an encoder in the published form, or of a timm backbone.

Wrappers leave prefixes on all keys, and classifiers come with most backbones: both are taken off,
and reported. All else must fit.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from s4g_ray.amounts import join_first
from s4g_ray.encoder.weights import NUM_SHOWN, StateDict, find_faults, load_strictly
from s4g_ray.encoder.weights_file import find_weights
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage

# of DataParallel and DDP, of torch.compile, and of modules that hold a backbone
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")
CLASSIFIERS = ("classifier.", "head.", "fc.")  # beside a backbone that has a prefix
SCALE = "logit_scale"


def load_pretrained(encoder: nn.Module, uri: str, report: Report = ignore_report) -> None:
    """Load a state dict: of a whole encoder in the published form, or of a bare timm backbone.

    The published form has the backbone's keys under `model.` and `logit_scale` beside them; all of
    it is loaded. Prefixes that all keys have (PREFIXES, several nested) are taken off. From a
    backbone's state dict, classifier weights are dropped, and keys of the EfficientNet-PyTorch
    family are renamed to timm's. An encoder with a backbone for each view loads weights without
    `reference_model.` into both. Weights of other sizes of images, and those in the form of their
    authors, are converted as timm converts them (position embeddings are taken as those of a
    square, unless they count the patches of the architecture's own size).

    report: gets a line for what is taken off or dropped. Raises InputError when the file is missing
    or holds other objects than tensors, and for keys and shapes that do not fit: it lists them.
    """
    source = f"model.pretrained={uri!r}"
    notes: dict[str, None] = {}  # an ordered set: two backbones may give the same
    state = _take_off_prefixes(encoder, read_state(uri), notes)
    backbones = {"model.": encoder.get_submodule("model")}
    if any(key.startswith("reference_model.") for key in encoder.state_dict()):
        backbones["reference_model."] = encoder.get_submodule("reference_model")
    if SCALE in state:
        whole = _copy_to_references(state) if len(backbones) > 1 else dict(state)
        for prefix, backbone in backbones.items():
            own = {key: value for key, value in whole.items() if key.startswith(prefix)}
            bare = {key.removeprefix(prefix): value for key, value in own.items()}
            converted = _convert_to_backbone(backbone, bare, notes)
            rest = {key: value for key, value in whole.items() if key not in own}
            whole = {**rest, **{f"{prefix}{key}": value for key, value in converted.items()}}
        load_strictly(encoder, whole, source)
    else:
        for backbone in backbones.values():
            load_strictly(backbone, _convert_to_backbone(backbone, state, notes), source)
    for note in notes:
        report(f"{source}: {note}")


def _take_off_prefixes(encoder: nn.Module, state: StateDict, notes: dict[str, None]) -> StateDict:
    """Return a state dict without the prefixes that all its keys have.

    The result is in the published form, with `logit_scale`, or has the names of a backbone.
    """
    expected = encoder.get_submodule("model").state_dict().keys()
    known = encoder.state_dict().keys()
    taken = ""
    scale: Tensor | None = None
    while state and not any(key in expected for key in state):
        if scale is None and SCALE in state:
            if any(key.startswith("model.") for key in state):
                break
            scale = state[SCALE]
            state = {key: value for key, value in state.items() if key != SCALE}
        prefix = _find_prefix(state, known)
        if prefix is None:
            break
        others = [key for key in state if not key.startswith(prefix)]
        if others:
            notes[f"dropped beside {prefix}*, a classifier: {join_first(others, NUM_SHOWN)}"] = None
        state = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        taken += prefix
    if taken:
        notes[f"took the prefix {taken!r} off all {len(state)} keys"] = None
        if scale is None and SCALE not in state and "model." in taken:
            notes["has no logit_scale: model.temperature stays as configured"] = None
    if scale is not None:
        return {SCALE: scale, **{f"model.{key}": value for key, value in state.items()}}
    return state


def _find_prefix(state: StateDict, known: Collection[str]) -> str | None:
    """Return a prefix of all keys but those of a classifier, which are not `known`."""
    for prefix in PREFIXES:
        others = [key for key in state if not key.startswith(prefix)]
        is_common = len(others) < len(state)
        if is_common and all(key.startswith(CLASSIFIERS) and key not in known for key in others):
            return prefix
    return None


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


def _convert_to_backbone(
    backbone: nn.Module, state: StateDict, notes: dict[str, None]
) -> StateDict:
    """Return a backbone's state dict with timm's names and the shapes of this backbone.

    Drops classifier weights. Returns a state dict that cannot be converted with its own names and
    shapes.
    """
    model: Any = backbone
    if any(key.startswith("_blocks.") for key in state):
        state = rename_efficientnet(state, [len(stage) for stage in model.blocks])
    state = _drop_classifier(model, state, notes)
    module = sys.modules[type(backbone).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)  # timm's, for downloaded weights
    if convert is None or _fits(backbone, state):
        return state
    try:
        converted = _drop_classifier(model, convert(dict(state), backbone), notes)
    except Exception:  # of many kinds: it is made for its own architectures' weights
        return state
    return converted if _fits(backbone, converted) else state


def _drop_classifier(model: Any, state: StateDict, notes: dict[str, None]) -> dict[str, Tensor]:
    """Return a state dict without the weights of a classifier, which the backbone does not have.

    Also without those of attention pooling, where the backbone pools otherwise.
    """
    named = model.pretrained_cfg.get("classifier") or ()
    names = ["classifier", "head.fc", "fc", "attn_pool"]
    names.extend([named] if isinstance(named, str) else named)
    prefixes = tuple(f"{name}." for name in names)
    expected = model.state_dict()
    others = [key for key in state if key not in expected]
    dropped = [key for key in others if key.startswith(prefixes)]
    if len(dropped) < len(others):
        of_model = _list_classifier_keys(model)
        dropped = [key for key in others if key in of_model or key.startswith(prefixes)]
    if dropped:
        notes[f"dropped the classifier: {join_first(dropped, NUM_SHOWN)}"] = None
    return {key: value for key, value in state.items() if key not in dropped}


def _list_classifier_keys(model: Any) -> set[str]:
    """Return the keys that the architecture has with a classifier, and the backbone has not."""
    name = model.pretrained_cfg.get("architecture")
    if not name or not timm.is_model(name):
        return set()
    try:
        with torch.device("meta"):  # shapes without memory
            whole = timm.create_model(name, num_classes=2)
    except Exception:  # some models compute with their weights when they are built
        return set()
    return set(whole.state_dict()) - set(model.state_dict())


def _fits(module: nn.Module, state: StateDict) -> bool:
    """Return whether a state dict has the module's keys and shapes."""
    return not any(find_faults(module, state).values())


def read_state(uri: str) -> StateDict:
    """Read the tensors of a .safetensors or .pth file; a .pth with torch.load(weights_only=True).

    uri: the file, or the folder of an export. Raises InputError when the file is missing, or is no
    state dict: it names the classes of other objects, or the keys.
    """
    path = find_weights(uri)
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
        classes = _list_classes(data, error)
        reason = f"damaged, or not tensors alone ({type(error).__name__}); only those are loaded"
        if classes:
            named = join_first(classes, NUM_SHOWN)
            reason = (
                f"not tensors alone: it holds {named}, which are not loaded because unpickling them"
                " may run code; save the tensors:"
                " torch.save(model.state_dict(), path)"
            )
        raise InputError(f"{uri}: not a readable state dict: {reason}") from error
    if _is_state_dict(state):
        return dict(state)
    raise InputError(f"{uri}: not a state dict, which has a tensor for each name: {_show(state)}")


def _is_state_dict(value: Any) -> bool:
    """Return whether a value maps names to tensors; an empty one does not."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _show(value: Any) -> str:
    """Describe what a file holds instead of a state dict, and how to save the state dict alone."""
    if not isinstance(value, Mapping):
        return f"it is a {type(value).__name__}; save the state dict alone"
    keys = f"its keys are {join_first(list(map(str, value)), NUM_SHOWN)}"
    within = [name for name, entry in value.items() if _is_state_dict(entry)]
    if not within:
        return f"{keys}; save the state dict alone"
    return f"{keys}; save {within[0]!r} alone: torch.save(torch.load(path)[{within[0]!r}], other)"


def _list_classes(data: bytes, error: Exception) -> list[str]:
    """Return the classes and functions that a pickle names and torch does not load."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:  # not of the zip form, or damaged: the message names the first
        return re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]


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
