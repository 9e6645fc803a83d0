"""Errors of a worker that end the run: another start would meet them again."""

from __future__ import annotations

from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import (
    BadImageError,
    GpuMemoryError,
    InputError,
    RunError,
    StoreError,
    WriteError,
    first_line,
    is_out_of_memory,
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
        return GpuMemoryError(message) if config.train.use_gpu else RunError(message)
    return None


def describe_out_of_memory(config: RunConfig, error: Exception) -> str:
    """Return the message of a worker without memory, with the settings that need less."""
    train = config.train
    fewest, most = train.workers
    share = -(-train.batch_size // most)
    shares = f"{share}" if fewest == most else f"{share} or more"
    remedies = [f"lower train.micro_batch_size (now {train.micro_batch_size or f'all {share}'})"]
    if not config.model.grad_checkpointing:
        remedies.append("set model.grad_checkpointing=true")
    remedies.append("use more train.num_workers")
    return (
        f"a worker ran out of memory with {shares} of train.batch_size={train.batch_size} pairs"
        f" ({first_line(error)}); {', or '.join(remedies)}, and resume; or"
        " lower train.batch_size with --resume --from-epoch N"
    )
