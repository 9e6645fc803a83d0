"""AdamW over groups of parameters, the schedule of its learning rate, and averaged weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from s4g_ray.config.training_schema import TrainConfig
from s4g_ray.encoder.architecture.parameter_groups import is_norm_or_bias, layer_of_parameters
from s4g_ray.encoder.encoder import Encoder


def learning_rate(cfg: TrainConfig, position: float) -> float:
    """Return the learning rate at a position in epochs.

    It rises linearly during the warm-up, then follows train.schedule to end_learning_rate.
    """
    if position < cfg.warmup_epochs:
        return cfg.learning_rate * position / cfg.warmup_epochs
    if cfg.schedule == "constant":
        return cfg.learning_rate
    decay_epochs = max(cfg.epochs - cfg.warmup_epochs, 1e-9)
    progress = min((position - cfg.warmup_epochs) / decay_epochs, 1)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    if cfg.schedule == "polynomial":
        share = (1 - progress) ** cfg.schedule_power
    return cfg.end_learning_rate + (cfg.learning_rate - cfg.end_learning_rate) * share


def group_parameters(
    encoder: Encoder, cfg: TrainConfig, *, decay_norms: bool
) -> list[dict[str, Any]]:
    """Return AdamW's groups of the parameters that train, in a fixed order.

    A group's `scale` is what its learning rate is multiplied by: layer_decay to the power of the
    layers between it and the last.
    """
    layers: dict[str, int] = {}
    if cfg.layer_decay < 1:  # timm does not tell the layers of all architectures
        layers = layer_of_parameters(encoder)
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(encoder).items():
        decays = decay_norms or not is_norm_or_bias(name, parameter)
        groups.setdefault((layers.get(name, last), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": cfg.weight_decay if decays else 0.0,
            "scale": cfg.layer_decay ** (last - layer),
        }
        for (layer, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def trained_parameters(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name; frozen ones are left out."""
    return {name: p for name, p in encoder.named_parameters() if p.requires_grad}


class Optimizer:
    """AdamW that leaves the weights as they are after a step whose gradients are not finite.

    Fused: one pass over the weights, which decides on the device, so that the host does not wait.
    Source: arXiv 1711.05101, algorithm 2.
    """

    def __init__(self, encoder: Encoder, cfg: TrainConfig, *, decay_norms: bool) -> None:
        self._cfg = cfg
        groups = group_parameters(encoder, cfg, decay_norms=decay_norms)
        self.adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, fused=True)
        self.parameters = [parameter for group in groups for parameter in group["params"]]

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the last layers in the step that ran last."""
        return max(float(group["lr"]) for group in self.adamw.param_groups)

    def prepare(self, position: float) -> None:
        """Drop the gradients and set the learning rates of a position in epochs."""
        rate = learning_rate(self._cfg, position)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["scale"]
        self.adamw.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Clip the gradients by norm and by value; return their norm before."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._cfg.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self._cfg.clip_norm, norm)
        nn.utils.clip_grad_value_(self.parameters, self._cfg.clip_value)
        return norm

    def step(self, is_skipped: Tensor) -> None:
        """Update the weights, unless is_skipped, a bool on the device, is true."""
        # torch's fused optimisers read the flag here, as its GradScaler sets it
        self.adamw.found_inf = is_skipped.float()  # type: ignore[attr-defined]
        self.adamw.step()


class WeightAverage:
    """An exponential moving average of the weights that train."""

    def __init__(self, encoder: nn.Module, decay: float) -> None:
        self._parameters: list[Tensor] = list(trained_parameters(encoder).values())
        self._names = list(trained_parameters(encoder))
        self._decay = decay
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights by 1 - decay of the distance."""
        torch._foreach_lerp_(self._average, self._parameters, 1 - self._decay)

    def by_name(self) -> dict[str, Tensor]:
        """Return the averaged weights by the names of the parameters."""
        return dict(zip(self._names, self._average, strict=True))
