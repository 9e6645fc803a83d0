"""The layers between a backbone and its embeddings: model.head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from s4g_ray.encoder.architecture.backbone import run_without_data
from s4g_ray.errors import InputError, first_line

SMALLEST = 1e-6  # value that GeM raises to a power: that of a negative value is not real


class Head(nn.Module):
    """Run a backbone and pool its output, as the model itself does: images -> [b, D]."""

    def forward(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """Embed normalised images[b, 3, H, W] -> [b, D]."""
        return backbone(images)  # type: ignore[no-any-return]


class LinearHead(Head):
    """Map the backbone's output, of `width` values, to embeddings of `dim` values."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, dim)

    def forward(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """Embed normalised images[b, 3, H, W] -> [b, dim]."""
        return self.projection(backbone(images))  # type: ignore[no-any-return]


class GeMHead(Head):
    """Pool by the generalised mean, mean(max(x, 1e-6)^p)^(1/p), with a learned p.

    It takes the place of the average over the feature map of a convolutional net or over the patch
    tokens of a transformer. The layers that the model has after its pooling stay: they get a map of
    one pixel, or one patch token, of which the average is itself. Source: arXiv 1711.02512,
    section 3.1.
    """

    def __init__(self, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))

    def forward(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """Embed normalised images[b, 3, H, W] -> [b, D]."""
        model: Any = backbone
        features: Tensor = model.forward_features(images)
        if features.ndim == 4:
            is_channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
            pooled = self.pool(features, (1, 2) if is_channels_last else (2, 3))
        else:
            num_prefix = getattr(model, "num_prefix_tokens", 0)  # class and register tokens
            patches = self.pool(features[:, num_prefix:], (1,))
            pooled = torch.cat([features[:, :num_prefix], patches], dim=1)
        return model.forward_head(pooled)  # type: ignore[no-any-return]

    def pool(self, features: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Return the generalised mean over dimensions, which stay with length 1.

        Computes in float32 at least: the cube of 41 exceeds float16.
        """
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        mean = wide.clamp(min=SMALLEST).pow(self.p).mean(dims, keepdim=True)
        return mean.pow(1 / self.p).to(features.dtype)


def prepare_for_gem(backbone: nn.Module) -> None:
    """Make a backbone average its patch tokens, where it takes its class token or attends to them.

    Raises InputError for an architecture whose pooling cannot be replaced.
    """
    model: Any = backbone
    pooling = getattr(model, "global_pool", "avg")
    if not isinstance(pooling, str) or pooling == "avg":
        return
    try:
        model.reset_classifier(0, "avg")
    except Exception as error:  # architectures raise errors of many kinds
        raise InputError(
            f"model.head=gem: the pooling of {type(backbone).__name__}, {pooling!r}, cannot be"
            f" replaced: {first_line(error)}; choose another head or model"
        ) from error


class _Pooled(nn.Module):
    """A backbone and its head as one module, for uint8 images."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        dtype = next(self.backbone.parameters()).dtype
        return self.head(self.backbone, images.to(dtype))  # type: ignore[no-any-return]


def measure_width(backbone: nn.Module, head: Head, size: tuple[int, int]) -> int:
    """Return D of the embeddings[b, D] that a backbone and its head give for images of a size.

    No attribute of timm's models is right for all: num_features is 1024 of HGNetV2, which gives
    2048. Raises InputError where the output is not [b, D].
    """
    name = type(backbone).__name__
    try:
        outputs = run_without_data(_Pooled(backbone, head), size)
    except Exception as error:  # models raise errors of many kinds for inputs that do not fit
        what = f"{name} gives no embedding of an image of {size[0]}x{size[1]}"
        remedy = "change model.options, or choose another model"
        if isinstance(head, GeMHead):
            what = f"model.head=gem: {name} has no feature map or patch tokens that GeM could pool"
            remedy = "choose another head or model"
        raise InputError(f"{what}: {first_line(error)}; {remedy}") from error
    shapes = [list(output.shape) for output in outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        shown = " and ".join(map(str, shapes))
        raise InputError(
            f"{name} gives {shown} for one image, where [1, D] is expected: its output is not"
            " pooled; set model.options.global_pool=avg, or choose another model"
        )
    return shapes[0][1]


def build_head(kind: str, backbone: nn.Module, size: tuple[int, int], dim: int | None) -> Head:
    """Build model.head for a backbone; dim: model.embedding_dim. Raises InputError."""
    if kind == "gem":
        prepare_for_gem(backbone)
        return GeMHead()
    if dim is not None:
        return LinearHead(measure_width(backbone, Head(), size), dim)
    return Head()
