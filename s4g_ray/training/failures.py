"""Errors of a worker that end the run: another start would meet them again."""

from __future__ import annotations

import torch

from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import (
    BadImageError,
    GpuMemoryError,
    InputError,
    RunError,
    StoreError,
    WriteError,
)

FAILURES: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (BadImageError, GpuMemoryError, InputError, RunError, StoreError, WriteError)
}


def failure_of(error: Exception, config: RunConfig) -> Exception | None:
    """Return the error that ends the run, for a worker's error; None for one that may pass."""
    if isinstance(error, tuple(FAILURES.values())):
        return error
    if is_out_of_memory(error):
        message = describe_out_of_memory(config, error)
        if isinstance(error, torch.OutOfMemoryError):
            return GpuMemoryError(message)
        return RunError(message)
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch found no memory, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def describe_out_of_memory(config: RunConfig, error: Exception) -> str:
    """Return the message of a worker without memory, with the settings that need less."""
    train = config.train
    share = -(-train.batch_size // train.workers[1])
    remedies = [f"train.micro_batch_size (now {train.micro_batch_size or f'all {share}'})"]
    if not config.model.grad_checkpointing:
        remedies.append("model.grad_checkpointing=true")
    remedies.append("more train.num_workers")
    return (
        f"a worker ran out of memory with {share} of train.batch_size={train.batch_size} pairs"
        f" ({str(error).splitlines()[0]}); lower {', or set '.join(remedies[:2])}, or use"
        f" {remedies[-1]}, and resume"
    )
