"""Find a file of weights. Does not import torch, so that a missing file is reported at once."""

from __future__ import annotations

from s4g_ray.errors import InputError
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage

WEIGHTS = "model.safetensors"  # in a checkpoint and in an export


def find_weights(uri: str) -> str:
    """Return the path of a file of weights, or of that in the folder of an export.

    Raises InputError when there is none.
    """
    path = files.resolve_package(files.absolute(uri))
    try:
        within = files.join(path, WEIGHTS)
        if files.exists(within):
            return within
        if files.exists(path):
            return path
    except OSError as error:
        reraise_outage(error)
        raise InputError(f"cannot read weights: {error}") from error
    raise InputError(f"cannot read weights: {path} is not there")
