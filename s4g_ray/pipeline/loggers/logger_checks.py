"""Check that the loggers of a configuration can be used, before a run starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from s4g_ray.config.schema import LoggerName
from s4g_ray.errors import InputError


class Package(NamedTuple):
    """A module that a logger needs, an attribute of it, and the package that brings it."""

    module: str
    attribute: str
    package: str


PACKAGES: dict[LoggerName, Package] = {
    "tensorboard": Package("torch.utils.tensorboard", "SummaryWriter", "tensorboard"),
    "wandb": Package("wandb", "init", "wandb"),
    "mlflow": Package("mlflow", "MlflowClient", "mlflow-skinny"),
}


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raise InputError for loggers whose package is missing, or that have no login or no store."""
    for name in names:
        needed = PACKAGES[name]
        try:
            # a folder of the package's name in the working directory imports as an empty module
            getattr(import_module(needed.module), needed.attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"loggers: {name} needs the package {needed.package} ({error}); install it with"
                f" `pip install 's4g-ray[{name}]'`, or remove {name} from loggers"
            ) from error
        if name == "wandb":
            _check_login()
        if name == "mlflow":
            _check_store()


def _check_login() -> None:
    """Log in to Weights & Biases as its client does: a terminal asks for the key.

    Raises InputError without a key where nobody can be asked.
    """
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    try:
        import_module("wandb").login()
    except Exception as error:
        raise InputError(
            f"loggers: wandb cannot log in ({error}); set WANDB_API_KEY, run `wandb login`, or set"
            " WANDB_MODE=offline"
        ) from error


def _check_store() -> None:
    """Raise InputError for a MLFLOW_TRACKING_URI that this installation of MLflow cannot use.

    Asks no server.
    """
    try:
        import_module("mlflow").MlflowClient()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"loggers: mlflow cannot use its store ({reason}); set MLFLOW_TRACKING_URI to a server"
            " (http://...), or to a folder (file:///...) with MLFLOW_ALLOW_FILE_STORE=true"
        ) from error
