"""Create timm backbones from the configuration, and measure their output."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from s4g_ray.config.data_schema import Size
from s4g_ray.config.training_schema import RESERVED_OPTIONS, ModelConfig
from s4g_ray.errors import InputError, first_line

NUM_SIMILAR = 5  # names in the message of an unknown model
LIKENESS = 0.6  # of two names without a common word, as difflib has it, above which they are alike
# options that determine which sizes of images the backbone takes
SIZE_OPTIONS = {"img_size", "dynamic_img_size", "strict_img_size"}


def create_backbone(cfg: ModelConfig, *, seed: int, download: bool) -> nn.Module:
    """Create the backbone without a classifier, with weights seeded or downloaded from timm's hub.

    Sets dynamic_img_size where timm's architecture has it and cfg.options says nothing about sizes:
    the model then keeps its own position embeddings, and resamples them for each size of images.
    Seeds the global generator.

    Raises InputError for an unknown architecture, for options that it does not take, and where the
    weights cannot be downloaded.
    """
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in cfg.options.items()
    }
    if not SIZE_OPTIONS & options.keys():
        try:
            return _create(cfg, {**options, "dynamic_img_size": True}, seed, download)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise InputError(_describe_unknown_option(cfg, error)) from error
    try:
        return _create(cfg, options, seed, download)
    except TypeError as error:
        raise InputError(_describe_unknown_option(cfg, error)) from error


def _create(cfg: ModelConfig, options: Mapping[str, Any], seed: int, download: bool) -> nn.Module:
    """Call timm. Raises InputError, and TypeError for keywords that the architecture lacks."""
    torch.manual_seed(seed)
    try:
        return timm.create_model(cfg.name, pretrained=download, num_classes=0, **options)
    except TypeError:
        raise
    except OSError as error:
        raise InputError(
            f"model.pretrained=true: the weights of {cfg.name} could not be downloaded"
            f" ({type(error).__name__}: {first_line(error)}); give a path, or false"
        ) from error
    except Exception as error:  # models raise errors of many kinds for values that do not fit
        if cfg.options and timm.is_model(cfg.name.split(".")[0]):
            raise InputError(
                f"model.options={cfg.options}: {cfg.name} cannot be built so:"
                f" {first_line(error)}; change the options or remove them"
            ) from error
        if not isinstance(error, RuntimeError | ValueError):
            raise
        raise InputError(_describe_unknown_model(cfg.name, error)) from error


def _describe_unknown_model(name: str, error: Exception) -> str:
    """Return the message of a name that timm does not know, with the most similar ones."""
    base, _, tag = name.partition(".")
    if timm.is_model(base):
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
        similar = difflib.get_close_matches(tag, tags, NUM_SIMILAR, 0) or tags[:NUM_SIMILAR]
        shown = ", ".join(f"{base}.{one}" for one in similar) or f"{base}, without a tag"
    else:
        shown = ", ".join(_find_similar(base, timm.list_models())) or "none"
    return f"model.name={name!r}: {first_line(error)}; similar: {shown}"


def _find_similar(name: str, known: list[str]) -> list[str]:
    """Return the known names that have the most words of a name, the most alike of them first."""
    words = set(name.split("_"))
    ranked = []
    for other in known:
        num_shared = len(words.intersection(other.split("_")))
        likeness = difflib.SequenceMatcher(None, name, other).ratio()
        if num_shared or likeness >= LIKENESS:
            ranked.append((num_shared, likeness, other))
    return [other for _, _, other in sorted(ranked, reverse=True)[:NUM_SIMILAR]]


def _describe_unknown_option(cfg: ModelConfig, error: TypeError) -> str:
    """Return the message of options that an architecture lacks, with those that it has."""
    unknown = [name for name in cfg.options if re.search(rf"'{re.escape(name)}'", str(error))]
    if not unknown:
        return f"model.options={cfg.options}: {cfg.name} does not take them: {first_line(error)}"
    if "multiple values" in str(error):
        return f"model.options.{unknown[0]}: {cfg.name} sets it by itself; remove it"
    with torch.device("meta"):
        architecture = type(timm.create_model(cfg.name, num_classes=0))
    parameters = inspect.signature(architecture.__init__).parameters.values()
    known = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in {"self", "device", "dtype", *RESERVED_OPTIONS}
    ]
    return (
        f"model.options.{unknown[0]}: {cfg.name} ({architecture.__name__}) has no such keyword; it"
        f" has {', '.join(known)}"
    )


def run_without_data(module: nn.Module, *sizes: Size) -> tuple[Tensor, ...]:
    """Call a module in eval mode on one image of each size [1, 3, h, w]; return its outputs.

    The outputs have shapes but no data: the module's tensors are replaced by those of torch's
    device `meta`, which computes shapes alone (0.1 s for a ViT of 12 blocks; no memory). Where the
    module cannot run so, it runs on images of zeros. Raises the module's errors.
    """
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            try:
                return _as_tuple(_run_on_meta(module, sizes))
            except Exception as error:
                tensor = next(module.parameters())
                if tensor.is_meta or not needs_data(error):
                    raise
            shapes = [(1, 3, *size) for size in sizes]
            images = [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]
            return _as_tuple(module(*[image.to(tensor.device) for image in images]))
    finally:
        for child, mode in training.items():
            child.training = mode


def needs_data(error: Exception) -> bool:
    """Return whether an error arose because tensors of device `meta` have no data."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


def _run_on_meta(module: nn.Module, sizes: tuple[Size, ...]) -> Any:
    state = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        state[name] = tensor.to("meta")
    images = [torch.empty((1, 3, *size), dtype=torch.uint8, device="meta") for size in sizes]
    return functional_call(module, state, tuple(images))


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
