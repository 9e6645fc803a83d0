"""Open a run, an export or a weights file as an encoder."""

from __future__ import annotations

from dataclasses import dataclass

from s4g_ray.config.loading import load_config, parse_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.encoder.precision import Numerics
from s4g_ray.encoder.weights import WEIGHTS
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import is_published, latest_version

DESCRIPTION = "model.json"
FORMAT = "s4g-model"
DATA_KEYS = (
    "query_size",
    "reference_size",
    "query_cut",
    "query_heading",
    "query_fov_deg",
    "antialias",
)


def find_checkpoint(run: str, epoch: int | None = None) -> str:
    """The URI of a run's checkpoint of an epoch, or of its last. Raises InputError when there is none."""
    folder = files.join(run, "checkpoints")
    if not files.exists(files.join(run, "run.json")):
        raise InputError(f"{run} is no run's folder: run.json is missing")
    found = latest_version(folder, "epoch") if epoch is None else epoch
    uri = files.join(folder, f"epoch={found:04d}") if found is not None else folder
    if found is None or not is_published(uri):
        raise InputError(
            f"{uri} holds no published checkpoint; there are: {', '.join(files.list_names(folder))}"
        )
    return uri


@dataclass(frozen=True)
class EncoderSource:
    """Where an encoder comes from: its configuration, and a run's checkpoint or else model.pretrained."""

    uri: str
    config: RunConfig
    checkpoint: str | None = None
    numerics: Numerics | None = None  # what a run chose

    def numerics_for(self, config: RunConfig) -> Numerics:
        """What the run chose, unless a configuration says otherwise; where it says auto, float32."""
        train = config.train
        asked = train.precision, train.channels_last
        if self.numerics is not None and asked == (
            self.config.train.precision,
            self.config.train.channels_last,
        ):
            return self.numerics
        return Numerics(
            "fp32" if train.precision == "auto" else train.precision, train.channels_last is True
        )


def open_source(
    uri: str, data_uri: str, *, config: RunConfig | None = None, epoch: int | None = None
) -> EncoderSource:
    """Open a run's folder, an exported folder, or a file of weights, for use on a data set.

    A file of weights takes its architecture and sizes from model.json beside it, or from `config`, which goes
    before what a run or an export says, and says how the object store is reached. Raises InputError for what is none
    of these.
    """
    if config is not None:
        s3_settings.apply(config.storage)
    path = files.resolve_package(files.absolute(uri))
    is_file = path.endswith((".pth", ".pt", ".safetensors"))
    if not is_file and files.exists(files.join(path, "run.json")):
        checkpoint = find_checkpoint(path, epoch)
        chosen = files.read_json(files.join(path, "run.json")).get("numerics")
        config = config or load_config(files.join(path, "config.yaml"))
        return EncoderSource(
            path, _on(config, data_uri), checkpoint, Numerics(**chosen) if chosen else None
        )
    folder = path.rpartition("/")[0] if is_file else path
    description = files.join(folder, DESCRIPTION)
    weights = path if is_file else files.join(path, WEIGHTS)
    if config is None:
        if not files.exists(description):
            what = (
                "a file of weights without model.json beside it: name a configuration with --config"
            )
            raise InputError(
                f"{uri} is {what if is_file else 'no run, no export and no .pth or .safetensors file'}"
            )
        config = _read_description(description, data_uri)
    if epoch is not None:
        raise InputError(f"{uri} is no run's folder: it has no epochs to choose from")
    model = config.model.model_copy(update={"pretrained": weights})
    return EncoderSource(path, _on(config.model_copy(update={"model": model}), data_uri))


def _on(config: RunConfig, data_uri: str) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"uri": data_uri})})


def _read_description(uri: str, data_uri: str) -> RunConfig:
    try:
        value = files.read_json(uri)
    except RunError as error:
        raise InputError(str(error)) from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != 1:
        raise InputError(f"{uri} is not of format {FORMAT!r}, version 1")
    if not isinstance(value.get("data"), dict) or not isinstance(value.get("architecture"), str):
        raise InputError(f"{uri} lacks its architecture or its data; export the model again")
    tree = {
        "run_dir": "-",
        "data": {"uri": data_uri, **value["data"]},
        "model": {"name": value["architecture"]},
    }
    return parse_config(tree)
