"""Exported models: weights as safetensors and in the published form, and a JSON of all that using them takes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch

from s4g_ray import object_store, storage
from s4g_ray.config import RunConfig, load_config, parse_config
from s4g_ray.encoder import WEIGHTS, Numerics, encode_weights, load_encoder
from s4g_ray.errors import InputError, RunError
from s4g_ray.object_store import raise_outage

DESCRIPTION = "model.json"
PUBLISHED_WEIGHTS = "model.pth"
FORMAT = "s4g-model"
DATA_KEYS = ("query_size", "reference_size", "query_cut", "query_heading", "query_fov_deg", "antialias")


def export(run_dir: str, target: str, *, epoch: int | None = None) -> dict[str, Any]:
    """Write a checkpoint of a run (the last one) to a folder; returns what model.json holds.

    model.safetensors and model.pth hold the same tensors under the same names: the timm backbone's under
    `model.`, and `logit_scale`. Raises InputError when there is no such checkpoint, or the folder holds a model.
    """
    run = storage.absolute(run_dir)
    target = storage.absolute(target)
    held = {DESCRIPTION, WEIGHTS, PUBLISHED_WEIGHTS, "run.json"} & set(storage.list_names(target))
    if held:
        raise InputError(f"{target} holds {' and '.join(sorted(held))} already; choose another folder")
    checkpoint = find_checkpoint(run, epoch)
    config = load_config(storage.join(run, "config.yaml"))
    encoder = load_encoder(config.model, checkpoint)
    weights, published = encode_weights(encoder), io.BytesIO()
    torch.save(dict(encoder.state_dict()), published)
    data = config.data.model_dump(mode="json")
    description = {
        "format": FORMAT,
        "version": 1,
        "architecture": config.model.name,
        "dim": encoder.dim,
        "data": {key: data[key] for key in DATA_KEYS},
        "mean": [round(x / 255, 6) for x in encoder.mean.flatten().tolist()],  # of pixels in 0..1
        "std": [round(x / 255, 6) for x in encoder.std.flatten().tolist()],
        "temperature": float((-encoder.logit_scale.detach()).exp()),
        "weights_sha256": storage.fingerprint(weights),
        "trained_on": storage.read_json(storage.join(run, "run.json"))["dataset"]["name"],
        **{key: storage.open_published(checkpoint, "checkpoint").info[key] for key in ("epoch", "step")},
    }
    try:
        storage.write_bytes(storage.join(target, WEIGHTS), weights)
        storage.write_bytes(storage.join(target, PUBLISHED_WEIGHTS), published.getvalue())
        storage.write_json(storage.join(target, DESCRIPTION), description)
    except OSError as error:
        raise_outage(error)
        raise InputError(str(error)) from error
    return description


def find_checkpoint(run: str, epoch: int | None = None) -> str:
    """The URI of a run's checkpoint of an epoch, or of its last. Raises InputError when there is none."""
    folder = storage.join(run, "checkpoints")
    if not storage.exists(storage.join(run, "run.json")):
        raise InputError(f"{run} is no run's folder: run.json is missing")
    found = storage.latest_version(folder, "epoch") if epoch is None else epoch
    uri = storage.join(folder, f"epoch={found:04d}") if found is not None else folder
    if found is None or not storage.is_published(uri):
        raise InputError(f"{uri} holds no published checkpoint; there are: {', '.join(storage.list_names(folder))}")
    return uri


@dataclass(frozen=True)
class Source:
    """Where an encoder comes from: its configuration, and a run's checkpoint or else model.pretrained."""

    uri: str
    config: RunConfig
    checkpoint: str | None = None
    numerics: Numerics | None = None  # what a run chose

    def numerics_for(self, config: RunConfig) -> Numerics:
        """What the run chose, unless a configuration says otherwise; where it says auto, float32."""
        train = config.train
        asked = train.precision, train.channels_last
        if self.numerics is not None and asked == (self.config.train.precision, self.config.train.channels_last):
            return self.numerics
        return Numerics("fp32" if train.precision == "auto" else train.precision, train.channels_last is True)


def open_source(uri: str, data_uri: str, *, config: RunConfig | None = None, epoch: int | None = None) -> Source:
    """Open a run's folder, an exported folder, or a file of weights, for use on a data set.

    A file of weights takes its architecture and sizes from model.json beside it, or from `config`, which goes
    before what a run or an export says, and says how the object store is reached. Raises InputError for what is none
    of these.
    """
    if config is not None:
        object_store.apply(config.storage)
    path = storage.resolve_package(storage.absolute(uri))
    is_file = path.endswith((".pth", ".pt", ".safetensors"))
    if not is_file and storage.exists(storage.join(path, "run.json")):
        checkpoint = find_checkpoint(path, epoch)
        chosen = storage.read_json(storage.join(path, "run.json")).get("numerics")
        config = config or load_config(storage.join(path, "config.yaml"))
        return Source(path, _on(config, data_uri), checkpoint, Numerics(**chosen) if chosen else None)
    folder = path.rpartition("/")[0] if is_file else path
    description = storage.join(folder, DESCRIPTION)
    weights = path if is_file else storage.join(path, WEIGHTS)
    if config is None:
        if not storage.exists(description):
            what = "a file of weights without model.json beside it: name a configuration with --config"
            raise InputError(f"{uri} is {what if is_file else 'no run, no export and no .pth or .safetensors file'}")
        config = _read_description(description, data_uri)
    if epoch is not None:
        raise InputError(f"{uri} is no run's folder: it has no epochs to choose from")
    model = config.model.model_copy(update={"pretrained": weights})
    return Source(path, _on(config.model_copy(update={"model": model}), data_uri))


def _on(config: RunConfig, data_uri: str) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"uri": data_uri})})


def _read_description(uri: str, data_uri: str) -> RunConfig:
    try:
        value = storage.read_json(uri)
    except RunError as error:
        raise InputError(str(error)) from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != 1:
        raise InputError(f"{uri} is not of format {FORMAT!r}, version 1")
    if not isinstance(value.get("data"), dict) or not isinstance(value.get("architecture"), str):
        raise InputError(f"{uri} lacks its architecture or its data; export the model again")
    tree = {"run_dir": "-", "data": {"uri": data_uri, **value["data"]}, "model": {"name": value["architecture"]}}
    return parse_config(tree)
