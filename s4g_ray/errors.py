"""The errors that a user can act on; the command line maps them to exit codes."""

from __future__ import annotations

import re


class InputError(ValueError):
    """Bad input or configuration: the message gives value, limit and remedy. Exit code 2."""


class BadImageError(InputError):
    """An image that cannot be read or decoded while `data.on_bad_image` is `fail`. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (non-finite loss or embeddings, a dead worker). Exit code 1."""


class WriteError(RunError, OSError):
    """A store that is full, or that refuses. Exit code 1."""


class StoreError(RunError, OSError):
    """An object store that refuses, or did not answer however often it was asked: names bucket and key. Exit code 1."""


class DeadProcessError(RuntimeError):
    """A process that a worker needs has died: the worker is lost, and started again as one that died itself."""


def reason_of(error: Exception) -> str:
    """The last line of an error's traceback that names an exception which is not Ray's own, or its last line."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    named = [
        line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception|Arrow\w+): ", line)
    ]
    return (named or lines)[-1]
