"""Check that an encoder takes the configured sizes of images, before anything is written."""

from __future__ import annotations

import inspect

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from s4g_ray.config.data_schema import DataConfig, Size, format_fov
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.data.image_table import View
from s4g_ray.encoder.architecture.backbone import SIZE_OPTIONS, needs_data, run_without_data
from s4g_ray.encoder.architecture.parameter_groups import layer_of_parameters
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.errors import InputError, first_line

SIZE_KEYS: dict[View, str] = {"queries": "query_size", "references": "reference_size"}
# pixels: patches and strides of timm's models, of which sizes are multiples that may fit
STEPS = (4, 7, 8, 10, 12, 14, 16, 24, 28, 32, 48, 56, 64)


class _OneView(nn.Module):
    """An encoder of one view as a module of its own."""

    def __init__(self, encoder: Encoder, view: View) -> None:
        super().__init__()
        self.encoder = encoder
        self.view: View = view

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.embed(images, self.view)


def fit_model_to_sizes(model: ModelConfig, data: DataConfig) -> ModelConfig:
    """Check one forward pass of both views at the sizes of section `data`; return the section.

    Loads no weights, and takes no memory for them: computes shapes alone. Architectures that are
    built for images of one size get options.img_size, so that they are built for this one.

    Raises InputError, with a line a view, for a size that the model does not take, with the nearest
    one that it does; and for a model that cannot be built.
    """
    sizes: dict[View, Size] = {
        "queries": data.visible_query_size,
        "references": data.reference_size,
    }
    encoder = _build_without_weights(model)
    faults = {view: _find_fault(encoder, view, size) for view, size in sizes.items()}
    if not any(faults.values()):
        return model
    is_resizable = _is_built_for_a_size(encoder, model) and len(set(sizes.values())) == 1
    if is_resizable:
        resized = _with_image_size(model, data.reference_size)
        if _takes(resized, data.reference_size):
            return resized
    lines = []
    remedies: dict[Size, str] = {}  # the same for both views
    for view, fault in faults.items():
        if fault:
            size = sizes[view]
            if size not in remedies:
                remedies[size] = _find_remedy(encoder, model, size, is_resizable)
            lines.append(_describe(model, data, view, size, f"{fault}; {remedies[size]}"))
    raise InputError("\n".join(lines))


def check_layers(model: ModelConfig) -> None:
    """Raise InputError where timm does not tell a model's layers, which train.layer_decay needs."""
    layer_of_parameters(_build_without_weights(model))


def _build_without_weights(model: ModelConfig) -> Encoder:
    """Build an encoder whose tensors have no data, or random ones where it cannot be built so."""
    try:
        with torch.device("meta"):
            return Encoder.build(model, weights=False)
    except Exception as error:
        if not needs_data(error):
            raise
    return Encoder.build(model, weights=False)


def _find_fault(encoder: Encoder, view: View, size: Size) -> str:
    """Return the error of a view's forward pass at a size; an empty text if there is none.

    Models built for a size crop what its patches leave, without an error: that is a fault, too.
    """
    patches = getattr(encoder.model, "patch_embed", None)
    if isinstance(patches, PatchEmbed) and not patches.dynamic_img_pad:
        height, width = patches.patch_size
        if size[0] % height or size[1] % width:
            return f"its patches of {height}x{width} pixels do not divide it"
    try:
        outputs = run_without_data(_OneView(encoder, view), size)
    except Exception as error:  # models raise errors of many kinds for sizes that do not fit
        return first_line(error).rstrip(".")
    shape = list(outputs[0].shape)
    return "" if shape == [1, encoder.dim] else f"the output has shape {shape}"


def _is_built_for_a_size(encoder: Encoder, model: ModelConfig) -> bool:
    """Return whether options.img_size, which is not set, would build the model for other sizes."""
    backbone = encoder.model
    has_option = "img_size" in inspect.signature(type(backbone).__init__).parameters
    takes_any = getattr(backbone, "dynamic_img_size", False)
    return has_option and not takes_any and not SIZE_OPTIONS & model.options.keys()


def _with_image_size(model: ModelConfig, size: Size) -> ModelConfig:
    return model.model_copy(update={"options": {**model.options, "img_size": list(size)}})


def _takes(model: ModelConfig, size: Size) -> bool:
    """Return whether a model can be built, and takes images of a size."""
    try:
        encoder = _build_without_weights(model)
    except InputError:
        return False
    return not _find_fault(encoder, "references", size)


def _find_remedy(encoder: Encoder, model: ModelConfig, size: Size, is_resizable: bool) -> str:
    """Return what a user can do about a size that a model does not take.

    is_resizable: whether the model could be built for another size than the encoder's.
    """
    if is_resizable:
        for near in _near_sizes(size):
            if _takes(_with_image_size(model, near), near):
                return f"the nearest size that fits is {list(near)}, of queries and references"
    for near in _near_sizes(size):
        if not _find_fault(encoder, "references", near):
            return f"the nearest size that fits is {list(near)}"
    if SIZE_OPTIONS & model.options.keys():
        return "change it, or model.options"
    return (
        "set data.query_size and data.reference_size to one size, for which the model is then"
        " built, or choose a model that takes any size"
    )


def _near_sizes(size: Size) -> list[Size]:
    """Return sizes whose height and width are multiples of one of STEPS, the nearest first."""
    height, width = size
    found = {
        (max(1, round(height / step)) * step, max(1, round(width / step)) * step) for step in STEPS
    }
    return sorted(found, key=lambda near: (abs(near[0] - height) + abs(near[1] - width), near))


def _describe(model: ModelConfig, data: DataConfig, view: View, size: Size, fault: str) -> str:
    key = SIZE_KEYS[view]
    shown = f"data.{key}={list(getattr(data, key))}"
    if view == "queries" and size != data.query_size:
        shown += f", of which query_fov_deg={format_fov(data.query_fov_deg)} leaves {list(size)},"
    return f"{shown} does not fit {model.name}: {fault}"
