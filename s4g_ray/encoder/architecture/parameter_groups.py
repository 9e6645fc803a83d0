"""The depth of each parameter: which stages are frozen, and layer-wise learning rates.

timm tells for each architecture which parameters form its stem, its stages and its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn

from s4g_ray.errors import InputError

_NO_PARAMETER = "?"  # a name that no architecture has: timm puts it into the group of the head


@dataclass(frozen=True)
class _Names:
    """The part of a module that timm's group_parameters reads."""

    names: list[str]

    def named_parameters(self) -> Iterator[tuple[str, None]]:
        for name in self.names:
            yield name, None


def group_by_depth(backbone: nn.Module, name: str, *, coarse: bool) -> tuple[dict[str, int], int]:
    """Return the depth of each parameter, and the number of stages or blocks.

    The stem has depth 0, stages or blocks have 1, 2, ..., and what follows them one more than the
    last. coarse: stages of a convolutional net rather than their blocks; a ViT has blocks alone.
    name: of the architecture, for messages. Raises InputError where timm names no stages.
    """
    model: Any = backbone
    try:
        matcher = model.group_matcher(coarse=coarse)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"timm does not tell the stages of {name} ({type(backbone).__name__}), which"
            " model.freeze and layer-wise learning rates need; set model.freeze=0 and no decay by"
            " layers, or choose another model"
        ) from error
    names = [parameter for parameter, _ in backbone.named_parameters()]
    group: Any = group_parameters  # has incomplete annotations
    depths: dict[str, int] = group(_Names([*names, _NO_PARAMETER]), matcher, reverse=True)
    num_blocks = depths.pop(_NO_PARAMETER) - 1
    return {parameter: depths[parameter] for parameter in names}, num_blocks


def freeze_stages(backbone: nn.Module, count: int, name: str) -> None:
    """Freeze the stem and the first `count` stages or blocks; 0: nothing.

    Raises InputError for more stages than the architecture has.
    """
    if not count:
        return
    depths, num_blocks = group_by_depth(backbone, name, coarse=True)
    if count > num_blocks:
        raise InputError(
            f"model.freeze={count} exceeds the {num_blocks} stages or blocks of {name}; lower it"
        )
    for parameter, value in backbone.named_parameters():
        if depths[parameter] <= count:
            value.requires_grad_(False)


def layer_of_parameters(encoder: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter of an Encoder, for learning rates that decay by layers.

    0: the stem; 1..n: the n blocks; n + 1: what follows them, the head and logit_scale. Both
    backbones of an encoder with one for each view have the same layers. Raises InputError where
    timm does not tell the blocks of an architecture.
    """
    backbone = encoder.get_submodule("model")
    depths, num_blocks = group_by_depth(backbone, type(backbone).__name__, coarse=False)
    layers = {}
    for name, _ in encoder.named_parameters():
        part, _, rest = name.partition(".")
        is_backbone = part in ("model", "reference_model")
        layers[name] = depths[rest] if is_backbone else num_blocks + 1
    return layers


def is_norm_or_bias(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay usually spares a parameter.

    True for biases, the scales of norms and layers, and single values such as logit_scale: those of
    at most one dimension, and those named `bias`.
    """
    return parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"
