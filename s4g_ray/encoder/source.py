"""Open a run, an export or a file of weights as the source of an encoder.

Imports torch only to build the encoder, so that a source that is not there is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s4g_ray.config.loading import load_config, parse_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.config.training_schema import ModelConfig, TrainConfig
from s4g_ray.encoder.weights_file import WEIGHTS, find_weights
from s4g_ray.errors import InputError, RunError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import is_published, latest_version

if TYPE_CHECKING:
    from s4g_ray.encoder.encoder import Encoder
    from s4g_ray.encoder.precision import Numerics

DESCRIPTION = "model.json"
FORMAT = "s4g-model"
DATA_KEYS = (
    "query_size",
    "reference_size",
    "query_cut",
    "query_heading",
    "query_fov_deg",
    "antialias",
    "stretch",
    "bands",
)
# keys of section `model` that tell, beside the name, what the weights are those of
MODEL_KEYS = ("options", "shared", "head", "embedding_dim")


def find_checkpoint(run: str, epoch: int | None = None) -> str:
    """Return the URI of a run's checkpoint after an epoch, by default the last.

    Raises InputError when `run` is no run's folder, or holds no such checkpoint.
    """
    folder = files.join(run, "checkpoints")
    if not files.exists(files.join(run, "run.json")):
        raise InputError(f"{run} is no run's folder: run.json is missing")
    if epoch is None:
        epoch = latest_version(folder, "epoch")
    uri = folder
    if epoch is not None:
        uri = files.join(folder, f"epoch={epoch:04d}")
    if epoch is None or not is_published(uri):
        raise InputError(
            f"{uri} holds no published checkpoint; there are: {', '.join(files.list_names(folder))}"
        )
    return uri


@dataclass(frozen=True)
class EncoderSource:
    """The origin of an encoder: a configuration, and a run's checkpoint.

    Without a checkpoint, the configuration's model.pretrained names the weights.
    """

    uri: str
    config: RunConfig
    checkpoint: str | None = None
    numerics: Mapping[str, Any] | None = None  # the values that the run chose, as in run.json

    def build_encoder(self, model: ModelConfig, report: Report = ignore_report) -> Encoder:
        """Build the encoder, with the weights of the checkpoint or of model.pretrained.

        report: gets a line for what is dropped of weights from elsewhere.
        """
        from s4g_ray.encoder.checkpoint import load_encoder
        from s4g_ray.encoder.encoder import Encoder

        if self.checkpoint is None:
            return Encoder.build(model, report=report)
        return load_encoder(model, self.checkpoint)

    def numerics_for(self, train: TrainConfig) -> Numerics:
        """Return the numerics that the run chose, unless `train` asks for others than the run.

        Without a choice of the run, `auto` means float32 and the default memory format.
        """
        from s4g_ray.encoder.precision import Numerics

        own = self.config.train
        is_same = train.precision == own.precision and train.channels_last == own.channels_last
        if self.numerics is not None and is_same:
            return Numerics(**self.numerics)
        precision = "fp32" if train.precision == "auto" else train.precision
        return Numerics(precision, train.channels_last is True)


def open_source(
    uri: str, data_uri: str, *, config: RunConfig | None = None, epoch: int | None = None
) -> EncoderSource:
    """Open a run's folder, an exported folder, or a file of weights, for use on a data set.

    config: replaces the configuration of a run or an export, and holds the settings of the object
    store. A file of weights takes its architecture and sizes from model.json beside it, or else
    from `config`. epoch: of a run's checkpoint; the last one by default. Raises InputError when
    `uri` is none of these, or its weights are missing.
    """
    if config is not None:
        s3_settings.apply(config.storage)
    path = files.resolve_package(files.absolute(uri))
    is_file = path.endswith((".pth", ".pt", ".safetensors"))
    if not is_file and files.exists(files.join(path, "run.json")):
        return _open_run(path, data_uri, config, epoch)
    if config is None:
        folder = path.rpartition("/")[0] if is_file else path
        description = files.join(folder, DESCRIPTION)
        if not files.exists(description):
            reason = "no run, no export and no .pth or .safetensors file"
            if is_file:
                reason = (
                    "a file of weights without model.json beside it: name a configuration with"
                    " --config"
                )
            raise InputError(f"{uri} is {reason}")
        config = _read_description(description, data_uri)
    if epoch is not None:
        raise InputError(f"{uri} is no run's folder: it has no epochs to choose from")
    weights = find_weights(path if is_file else files.join(path, WEIGHTS))
    model = config.model.model_copy(update={"pretrained": weights})
    config = config.model_copy(update={"model": model})
    return EncoderSource(path, _with_data_uri(config, data_uri))


def _open_run(
    path: str, data_uri: str, config: RunConfig | None, epoch: int | None
) -> EncoderSource:
    checkpoint = find_checkpoint(path, epoch)
    numerics = files.read_json(files.join(path, "run.json")).get("numerics")
    if config is None:
        config = load_config(files.join(path, "config.yaml"))
    return EncoderSource(path, _with_data_uri(config, data_uri), checkpoint, numerics)


def _with_data_uri(config: RunConfig, data_uri: str) -> RunConfig:
    data = config.data
    if data_uri != files.absolute(data.uri):  # another data set, or the same elsewhere
        data = data.model_copy(update={"uri": data_uri, "images_root": None})
    return config.model_copy(update={"data": data})


def _read_description(uri: str, data_uri: str) -> RunConfig:
    """Read an export's model.json as a configuration. Raises InputError for any other content."""
    try:
        value = files.read_json(uri)
    except RunError as error:
        raise InputError(str(error)) from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != 1:
        raise InputError(f"{uri} is not of format {FORMAT!r}, version 1")
    if not isinstance(value.get("data"), dict) or not isinstance(value.get("architecture"), str):
        raise InputError(f"{uri} lacks its architecture or its data; export the model again")
    model = {key: value[key] for key in MODEL_KEYS if key in value}
    tree = {
        "run_dir": "-",
        "data": {"uri": data_uri, **value["data"]},
        "model": {"name": value["architecture"], **model},
    }
    return parse_config(tree)
