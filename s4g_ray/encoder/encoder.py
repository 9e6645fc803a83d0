"""Encode images of both views with timm backbones; holds the learnable logit scale too."""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
from timm.data.config import resolve_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.data.image_table import View
from s4g_ray.encoder.architecture.backbone import create_backbone
from s4g_ray.encoder.architecture.head import Head, build_head, measure_width
from s4g_ray.encoder.architecture.parameter_groups import freeze_stages
from s4g_ray.encoder.pretrained import load_pretrained
from s4g_ray.errors import InputError, first_line
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files


class Encoder(nn.Module):
    """Embed queries and references with the same weights, or with a backbone for each view.

    uint8 queries[b, 3, h, w], references[m, 3, H, W] -> (queries[b, D], references[m, D], scale),
    where scale = exp(logit_scale). By default the backbone's own pooling and no further head.
    Embeddings are not normalised: the loss and the embedding job do that, in float32. Source: arXiv
    2303.11851, section 3.1.

    State dicts hold `model.*` and `logit_scale`, `head.*` of a head with parameters, and
    `reference_model.*` and `reference_head.*` where the views do not share them.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        temperature: float,
        freeze_batch_norm: bool,
        *,
        head: str = "none",
        embedding_dim: int | None = None,
        shared: bool = True,
    ) -> None:
        super().__init__()
        self.model = backbone
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.freeze_batch_norm = freeze_batch_norm
        self.shared = shared
        resolve: Any = resolve_data_config  # has no annotations
        data: dict[str, Any] = resolve({}, model=backbone)
        self.register_buffer(
            "mean", 255 * torch.tensor(data["mean"]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", 255 * torch.tensor(data["std"]).view(1, 3, 1, 1), persistent=False
        )
        size = get_model_input_config(backbone)["input_size"][1:]  # options.img_size, where given
        self.head = build_head(head, backbone, size, embedding_dim)
        self.dim = embedding_dim or measure_width(backbone, self.head, size)  # D of an embedding
        if not shared:
            self.reference_model = copy.deepcopy(backbone)
            self.reference_head = copy.deepcopy(self.head)

    @classmethod
    def build(
        cls,
        cfg: ModelConfig,
        *,
        seed: int = 0,
        weights: bool = True,
        report: Report = ignore_report,
    ) -> Self:
        """Build an encoder from its configuration, with seeded initial weights.

        weights: whether to load the pretrained weights that cfg names; report gets a line for what
        is dropped of them. Raises InputError for an
        unknown architecture, for options, a head, stages to freeze and gradient checkpointing that
        it does not have, and for weights that are missing or do not fit.
        """
        with torch.random.fork_rng(devices=[]):
            download = weights and cfg.pretrained is True
            backbone = create_backbone(cfg, seed=seed, download=download)
            encoder = cls(
                backbone,
                cfg.temperature,
                cfg.freeze_batch_norm,
                head=cfg.head,
                embedding_dim=cfg.embedding_dim,
                shared=cfg.shared,
            )
        for model in encoder.backbones:
            if cfg.grad_checkpointing:
                _checkpoint_activations(model, cfg.name)
            freeze_stages(model, cfg.freeze, cfg.name)
        if weights and isinstance(cfg.pretrained, str):
            load_pretrained(encoder, cfg.pretrained, report)
        return encoder

    @property
    def backbones(self) -> list[nn.Module]:
        """Return the backbone that the views share, or that of queries and that of references."""
        return [self.model] if self.shared else [self.model, self.reference_model]

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
        """Set training mode, in which frozen batch norms keep their running statistics.

        All of them are frozen with freeze_batch_norm, else those of frozen stages.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                parameters = list(module.parameters())
                is_frozen = parameters and not any(value.requires_grad for value in parameters)
                if self.freeze_batch_norm or is_frozen:
                    module.eval()
        return self

    def embed(self, images: Tensor, view: View) -> Tensor:
        """Embed uint8 images[b, 3, H, W] of one view -> [b, D], not normalised."""
        normalised = (images.to(self.mean.dtype) - self.mean) / self.std
        model: nn.Module = self.model
        head: Head = self.head
        if view == "references" and not self.shared:
            model = self.reference_model
            head = self.reference_head
        return head(model, normalised)  # type: ignore[no-any-return]

    def forward(self, queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed both views in one call, as DDP needs: shapes as in the class's docstring.

        Runs a shared backbone once when all images have the same size, else once for each view.
        """
        if self.shared and queries.shape[1:] == references.shape[1:]:
            both = self.embed(torch.cat([queries, references]), "queries")
            embedded_q = both[: len(queries)]
            embedded_r = both[len(queries) :]
        else:
            embedded_q = self.embed(queries, "queries")
            embedded_r = self.embed(references, "references")
        return embedded_q, embedded_r, self.logit_scale.exp()


def _checkpoint_activations(backbone: nn.Module, name: str) -> None:
    """Turn on gradient checkpointing. Raises InputError where an architecture has none."""
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise InputError(
            f"model.grad_checkpointing=true, but {name} has none in timm"
            f" ({first_line(error)}); set it to false, and lower train.micro_batch_size where"
            " memory does not suffice"
        ) from error
