"""Export a run's model: weights in two forms, and model.json.

The weights are written as safetensors and in the published form (a .pth state dict). model.json
holds the architecture, the preprocessing of images and the origin of the weights: all that is
needed to use them.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.encoder.checkpoint import load_encoder
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.source import (
    DATA_KEYS,
    DESCRIPTION,
    FORMAT,
    MODEL_KEYS,
    find_checkpoint,
)
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.encoder.weights_file import WEIGHTS
from s4g_ray.errors import InputError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import open_published
from s4g_ray.storage.store_errors import reraise_outage

PUBLISHED_WEIGHTS = "model.pth"


def export(run_dir: str, target: str, *, epoch: int | None = None) -> dict[str, Any]:
    """Write a checkpoint of a run to a folder, and return the content of model.json.

    epoch: of the checkpoint; the last one by default. model.safetensors and model.pth hold the same
    tensors under the same names, those of Encoder's state dict: the timm backbone's under `model.`,
    `logit_scale`, and those of a head and of the references' own backbone. Raises InputError when
    there is no such checkpoint, or the folder holds a model.
    """
    run = files.absolute(run_dir)
    target = files.absolute(target)
    held = {DESCRIPTION, WEIGHTS, PUBLISHED_WEIGHTS, "run.json"} & set(files.list_names(target))
    if held:
        raise InputError(
            f"{target} holds {' and '.join(sorted(held))} already; choose another folder"
        )
    checkpoint = find_checkpoint(run, epoch)
    config = load_config(files.join(run, "config.yaml"))
    encoder = load_encoder(config.model, checkpoint)
    weights = encode_weights(encoder)
    info = open_published(checkpoint, "checkpoint").info
    published = io.BytesIO()
    torch.save(dict(encoder.state_dict()), published)
    description = {
        **describe_model(config, encoder, files.fingerprint(weights)),
        "trained_on": files.read_json(files.join(run, "run.json"))["dataset"]["name"],
        "epoch": info["epoch"],
        "step": info["step"],
    }
    try:
        files.write_bytes(files.join(target, WEIGHTS), weights)
        files.write_bytes(files.join(target, PUBLISHED_WEIGHTS), published.getvalue())
        files.write_json(files.join(target, DESCRIPTION), description)
    except OSError as error:
        reraise_outage(error)
        raise InputError(str(error)) from error
    return description


def describe_model(config: RunConfig, encoder: Encoder, weights_sha256: str) -> dict[str, Any]:
    """Return the entries of model.json that using the weights needs."""
    data = config.data.model_dump(mode="json")
    model = config.model.model_dump(mode="json")
    return {
        "format": FORMAT,
        "version": 1,
        "architecture": config.model.name,
        **{key: model[key] for key in MODEL_KEYS},
        "dim": encoder.dim,
        "data": {key: data[key] for key in DATA_KEYS},
        "mean": [round(x / 255, 6) for x in encoder.mean.flatten().tolist()],  # of pixels in 0..1
        "std": [round(x / 255, 6) for x in encoder.std.flatten().tolist()],
        "temperature": float((-encoder.logit_scale.detach()).exp()),
        "weights_sha256": weights_sha256,
    }
