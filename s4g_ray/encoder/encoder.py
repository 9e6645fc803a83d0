"""Encode images of both views with one timm backbone; holds the learnable logit scale too."""

from __future__ import annotations

import math
from typing import Any, Self

import timm
import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.encoder.weights import first_line, load_pretrained
from s4g_ray.errors import InputError
from s4g_ray.storage import files


class Encoder(nn.Module):
    """Embed queries and references with the same weights.

    uint8 queries[b, 3, h, w], references[m, 3, H, W] -> (queries[b, D], references[m, D], scale),
    where scale = exp(logit_scale). Global average pooling and no further head. Embeddings are not
    normalised: the loss and the embedding job do that, in float32. Source: arXiv 2303.11851,
    section 3.1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, temperature: float, freeze_batch_norm: bool) -> None:
        super().__init__()
        self.model = backbone
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.freeze_batch_norm = freeze_batch_norm
        resolve: Any = resolve_data_config  # has no annotations
        data: dict[str, Any] = resolve({}, model=backbone)
        self.register_buffer(
            "mean", 255 * torch.tensor(data["mean"]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", 255 * torch.tensor(data["std"]).view(1, 3, 1, 1), persistent=False
        )

    @classmethod
    def build(cls, cfg: ModelConfig, *, seed: int = 0, weights: bool = True) -> Self:
        """Build an encoder from its configuration, with seeded initial weights.

        weights: whether to load the pretrained weights that cfg names. Raises InputError for an
        unknown architecture, and for weights that are missing or do not fit.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                download = weights and cfg.pretrained is True
                backbone = timm.create_model(cfg.name, pretrained=download, num_classes=0)
            except RuntimeError as error:
                prefix = cfg.name.split(".")[0][:8]
                similar = ", ".join(timm.list_models(f"*{prefix}*")[:5]) or "none"
                raise InputError(f"model.name={cfg.name!r}: {error}; similar: {similar}") from error
            except OSError as error:
                raise InputError(
                    f"model.pretrained=true: the weights of {cfg.name} could not be downloaded"
                    f" ({type(error).__name__}: {first_line(error)}); give a path, or false"
                ) from error
        if cfg.grad_checkpointing:
            backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        encoder = cls(backbone, cfg.temperature, cfg.freeze_batch_norm)
        if weights and isinstance(cfg.pretrained, str):
            load_pretrained(encoder, cfg.pretrained)
        return encoder

    @property
    def dim(self) -> int:
        """Return D, the width of an embedding."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    def preprocessing(self, data: DataConfig) -> str:
        """Return a hash of all settings that turn an image file into the encoder's input."""
        parts = [
            [
                data.query_size,
                data.query_cut,
                data.query_heading,
                data.query_fov_deg,
                data.antialias,
            ],
            data.reference_size,
            self.mean.flatten().tolist(),
            self.std.flatten().tolist(),
        ]
        return files.fingerprint(repr(parts).encode())[:16]

    def train(self, mode: bool = True) -> Self:
        """Set training mode, in which frozen batch norms keep their running statistics."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Embed uint8 images[b, 3, H, W] -> [b, D], not normalised."""
        normalised = (images.to(self.mean.dtype) - self.mean) / self.std
        return self.model(normalised)  # type: ignore[no-any-return]

    def forward(self, queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed both views in one call, as DDP needs: shapes as in the class's docstring.

        Runs the backbone once when all images have the same size, else once for each view.
        """
        if queries.shape[1:] == references.shape[1:]:
            both = self.embed(torch.cat([queries, references]))
            embedded_q = both[: len(queries)]
            embedded_r = both[len(queries) :]
        else:
            embedded_q = self.embed(queries)
            embedded_r = self.embed(references)
        return embedded_q, embedded_r, self.logit_scale.exp()
