"""The shared encoder: a timm backbone for both views and a learnable logit scale; strict weights."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import safetensors.torch
import timm
import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from s4g_ray import storage
from s4g_ray.config import DataConfig, ModelConfig, TrainConfig
from s4g_ray.errors import InputError, RunError
from s4g_ray.object_store import raise_outage

StateDict = Mapping[str, Tensor]
Precision = Literal["fp32", "bf16", "fp16"]
WEIGHTS = "model.safetensors"  # in a checkpoint


class Encoder(nn.Module):
    """queries[b, 3, H, W], references[b, 3, h, w] uint8 -> (queries[b, D], references[b, D], scale).

    Global average pooling and no further head; embeddings are not normalised (the loss and the embedding job
    do that, in float32). scale = exp(logit_scale). Source: arXiv 2303.11851, section 3.1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, temperature: float, freeze_batch_norm: bool) -> None:
        super().__init__()
        self.model = backbone
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.freeze_batch_norm = freeze_batch_norm
        data: dict[str, Any] = resolve_data_config({}, model=backbone)  # type: ignore[no-untyped-call]
        self.register_buffer("mean", 255 * torch.tensor(data["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(data["std"]).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def build(cls, cfg: ModelConfig, *, seed: int = 0, weights: bool = True) -> Self:
        """Build from configuration, seeded; `weights=False` leaves the pretrained ones out.

        Raises InputError for an unknown architecture, and for weights that are missing or do not fit.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                hub = weights and cfg.pretrained is True
                backbone = timm.create_model(cfg.name, pretrained=hub, num_classes=0)
            except RuntimeError as error:
                close = ", ".join(timm.list_models(f"*{cfg.name.split('.')[0][:8]}*")[:5])
                raise InputError(f"model.name={cfg.name!r}: {error}; similar: {close or 'none'}") from error
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
        """D, the width of an embedding."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    def preprocessing(self, data: DataConfig) -> str:
        """A hash of all that turns an image file into the encoder's input."""
        parts = [
            [data.query_size, data.query_cut, data.query_heading, data.query_fov_deg, data.antialias],
            data.reference_size,
            self.mean.flatten().tolist(),
            self.std.flatten().tolist(),
        ]
        return storage.fingerprint(repr(parts).encode())[:16]

    def train(self, mode: bool = True) -> Self:
        """Training mode; frozen batch norms keep their running statistics."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """uint8 images[b, 3, H, W] -> embeddings[b, D], not normalised."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        return self.model(x)  # type: ignore[no-any-return]

    def forward(self, queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 queries[b, 3, h, w], references[m, 3, H, W] -> embeddings[b, D], [m, D] and exp(logit_scale).

        One call for both views, as DDP needs; one pass where the images are of one size.
        """
        if queries.shape[1:] == references.shape[1:]:
            both = self.embed(torch.cat([queries, references]))
            embedded_q, embedded_r = both[: len(queries)], both[len(queries) :]
        else:
            embedded_q, embedded_r = self.embed(queries), self.embed(references)
        return embedded_q, embedded_r, self.logit_scale.exp()


@dataclass(frozen=True)
class Numerics:
    """How the encoder computes: the loss is in float32 in any case."""

    precision: Precision = "fp32"  # of autocast
    channels_last: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return self.precision + (" channels_last" if self.channels_last else "")

    def prepare(self, encoder: Encoder) -> None:
        """Lay the weights out in memory as the inputs will be."""
        if self.channels_last:
            encoder.to(memory_format=torch.channels_last)

    def layout(self, images: Tensor) -> Tensor:
        """The images in the chosen memory format."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which forward passes run."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=self.precision != "fp32")

    def embed(self, encoder: Encoder, images: Tensor) -> Tensor:
        """encoder.embed, computed this way."""
        with self.autocast(images.device):
            return encoder.embed(self.layout(images))


def numerics_choices(train: TrainConfig) -> list[Numerics]:
    """What the configuration leaves open, the plainest first."""
    precisions: list[Precision] = ["fp32", "bf16"] if train.precision == "auto" else [train.precision]
    channels_last = [False, True] if train.channels_last == "auto" else [train.channels_last]
    return [Numerics(p, c) for p in precisions for c in channels_last]


def measure_numerics(
    model: ModelConfig, train: TrainConfig, size: tuple[int, int], checkpoint: str, device: str
) -> list[tuple[Numerics, float]]:
    """Images per second of a training step, for each choice that the configuration leaves open, best first.

    A processor without fast bf16, or an encoder of depthwise convolutions, is slower with it: so measure. The
    fastest of some steps counts (machines are shared); a choice must gain 10 % over plainer ones.
    """
    torch.set_num_threads(train.threads_per_worker)
    count = min(train.batch_size // train.workers[1], 16)
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8).to(device)
    speeds = []
    for numerics in numerics_choices(train):
        # real weights: random ones can drive activations into slow subnormal numbers
        encoder = load_encoder(model, checkpoint).to(device).train()
        numerics.prepare(encoder)
        best, deadline = math.inf, time.perf_counter() + 1.5
        while best == math.inf or time.perf_counter() < deadline:
            started = time.perf_counter()
            numerics.embed(encoder, images).float().square().mean().backward()  # type: ignore[no-untyped-call]
            if device != "cpu":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        speeds.append((numerics, count / best))
    return sorted(speeds, key=lambda pair: -pair[1] * 0.9 ** ((pair[0].precision != "fp32") + pair[0].channels_last))


def encode_weights(encoder: Encoder) -> bytes:
    """The encoder's weights as safetensors: `model.*` and `logit_scale`."""
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    return safetensors.torch.save(state)


def load_weights(encoder: Encoder, data: bytes, source: str) -> None:
    """Load what encode_weights gave. Raises InputError for other bytes, or lists keys and shapes that do not fit."""
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"{source} is not a safetensors file: {error}") from error
    _load_strictly(encoder, state, source)


def load_encoder(cfg: ModelConfig, checkpoint: str) -> Encoder:
    """The encoder of a published checkpoint. Raises RunError when it is unpublished or altered."""
    part = storage.open_published(checkpoint, "checkpoint").part(WEIGHTS)
    if part is None:
        raise RunError(f"{checkpoint} holds no {WEIGHTS}")
    encoder = Encoder.build(cfg, weights=False)
    load_weights(encoder, storage.read_part(checkpoint, part), storage.join(checkpoint, WEIGHTS))
    return encoder


def load_pretrained(encoder: Encoder, uri: str) -> None:
    """Load a state dict: of a whole encoder, in the published form, or of a bare timm backbone.

    The published form has the backbone's keys under `model.` and `logit_scale` beside them; all of it is loaded.
    Of a backbone's, classifier weights are left out, and keys of the EfficientNet-PyTorch family are renamed to
    timm's. Raises InputError when the file is missing, or lists the keys and shapes that do not fit.
    """
    state, what = read_state(uri), f"model.pretrained={uri!r}"
    if "logit_scale" in state or all(key.startswith("model.") for key in state):
        _load_strictly(encoder, state, what)
        return
    if any(key.startswith("_blocks.") for key in state):
        state = rename_efficientnet(state, [len(stage) for stage in encoder.model.blocks])  # type: ignore[union-attr]
    heads = ("classifier.", "head.fc.", "fc.")
    _load_strictly(encoder.model, {k: v for k, v in state.items() if not k.startswith(heads)}, what)


def read_state(uri: str) -> StateDict:
    """The tensors of a .safetensors file, or of a .pth that torch.load reads with weights_only=True.

    Raises InputError when the file is missing, or is no state dict.
    """
    path = storage.resolve_package(storage.absolute(uri))
    if storage.exists(storage.join(path, WEIGHTS)):  # an export's folder
        path = storage.join(path, WEIGHTS)
    try:
        data = storage.read_bytes(path)
    except OSError as error:
        raise_outage(error)
        raise InputError(f"cannot read weights: {error}") from error
    try:
        if path.endswith(".safetensors"):
            state: Any = safetensors.torch.load(data)
        else:
            state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # both libraries raise errors of many kinds for a damaged file
        reason = f"damaged, or not tensors alone ({type(error).__name__}); only those are loaded"
        raise InputError(f"{uri}: not a readable state dict: {reason}") from error
    items = state.items() if isinstance(state, Mapping) else ()
    if items and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
        return dict(items)
    held = f"its keys are {', '.join(map(str, list(state)[:5]))}" if isinstance(state, Mapping) else "it is none at all"
    raise InputError(f"{uri}: not a state dict, which has a tensor for each name: {held}; save that alone")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def rename_efficientnet(state: StateDict, depths: list[int]) -> dict[str, Tensor]:
    """Keys of EfficientNet-PyTorch (`_blocks.7._bn0.weight`) -> timm's (`blocks.3.1.bn1.weight`).

    `depths` is the number of blocks of each timm stage.
    """
    blocks = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    renamed = {}
    for key, value in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            number, layer, leaf = int(match[1]), match[2], match[3]
            names = inverted if f"_blocks.{number}._expand_conv.weight" in state else separable
            stage, i = blocks[number] if number < len(blocks) else (len(depths), number)
            renamed[f"blocks.{stage}.{i}.{names.get(layer, layer)}.{leaf}"] = value
        else:
            layer, _, leaf = key.partition(".")
            renamed[f"{outer.get(layer, layer)}.{leaf}"] = value
    return renamed


def _load_strictly(module: nn.Module, state: StateDict, source: str) -> None:
    wanted = module.state_dict()
    faults = [f"missing {key}" for key in wanted if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in wanted]
    faults += [
        f"{key} has shape {list(state[key].shape)}, {list(value.shape)} is wanted"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if faults:
        shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise InputError(
            f"{source} does not fit {type(module).__name__}, {len(wanted)} tensors ({len(faults)} faults; is model.name"
            f" right?): {shown}"
        )
    module.load_state_dict(dict(state))
