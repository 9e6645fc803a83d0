"""The errors that a user can act on; the command line maps them to exit codes."""


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
