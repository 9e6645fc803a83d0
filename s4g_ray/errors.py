"""Define the errors that a user can act on.

The command line maps each to an exit code: 2 for input that the user can fix, 1 for a failure.
"""

from __future__ import annotations

import re


class InputError(ValueError):
    """Bad input or configuration: the message gives value, limit and remedy. Exit code 2."""


class BadImageError(InputError):
    """An image that cannot be read or decoded while `data.on_bad_image` is `fail`. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot continue (non-finite loss or embeddings, a dead worker). Exit code 1."""


class GpuMemoryError(RunError):
    """A GPU without memory for a batch. Another try would fail in the same way. Exit code 1."""


class WriteError(RunError, OSError):
    """A file or object that cannot be written: no space, or no permission. Exit code 1."""


class StoreError(RunError, OSError):
    """An object store that refuses a request, or fails after all retries. Exit code 1.

    The message names bucket and key.
    """


class OwnershipLostError(RunError):
    """A folder that another process has taken over, while this one wrote it. Exit code 1."""


class UnavailableError(RunError):
    """A part that is away and is started again, such as an index shard. Exit code 1.

    The same request may be answered later.
    """


class DeadProcessError(RuntimeError):
    """A process that a worker depends on has died. The worker is restarted as if it had died."""


def reason_of(error: Exception) -> str:
    """Return the reason of a Ray error: the last exception in its text that is not Ray's.

    Returns the text's last line where it names no such exception.
    """
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines()]
    named = [
        line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception|Arrow\w+): ", line)
    ]
    return (named or lines)[-1]


def run_error_of(error: Exception) -> RunError | None:
    """Return a RunError with the reason of an error of Ray, Ray Data or Arrow; None for others.

    Some errors of Ray Data, as that of a job without progress, are no RayError.
    """
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    if packages.isdisjoint({"ray", "pyarrow"}):
        return None
    found = RunError(f"{type(error).__name__}: {reason_of(error)}")
    found.__cause__ = error
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name when the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# of CUDA itself, of cuBLAS, of NCCL and of the host's allocator, beside torch.OutOfMemoryError
NO_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch found no memory, on a GPU or on the host."""
    import torch  # not at the top: most of what imports this module needs no torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
