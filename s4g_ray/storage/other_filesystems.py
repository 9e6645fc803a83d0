"""Open file systems that fsspec has beside those of obstore: hf://, https:// and others.

Their clients raise errors of their own kinds; here they become StoreError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import fsspec

from s4g_ray.errors import InputError, StoreError, first_line

# packages of fsspec's clients, by scheme
CLIENTS = {"hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp", "sftp": "paramiko"}
OTHER_NAMES = {"gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "s3n": "s3"}
REQUESTS = (
    *("ls", "info", "isfile", "isdir", "find", "cat_file", "cat_ranges", "open"),
    *("pipe_file", "put_file", "cp_file", "rm", "rm_file"),
)


def open_filesystem(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI, and the path there. Makes no request.

    Its methods raise OSError alone: other errors become StoreError. Raises InputError for a scheme
    that fsspec does not know, and where the scheme's client is not installed.
    """
    try:
        filesystem, path = fsspec.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise InputError(_describe_scheme(uri, error)) from error
    scheme = uri.partition("://")[0]
    for name in REQUESTS:  # of this instance: Arrow takes no wrapper around a file system
        request = getattr(filesystem, name, None)
        if request is not None and not hasattr(request, "raises_os_errors"):
            setattr(filesystem, name, _explain(request, scheme))
    filesystem.exists = functools.partial(_exists, filesystem)
    return filesystem, path


def _exists(filesystem: Any, path: str, **_: Any) -> bool:
    """Return whether a file or folder exists; fsspec takes an outage for a file that does not."""
    try:
        filesystem.info(path)
    except FileNotFoundError:
        return False
    return True


def _describe_scheme(uri: str, error: Exception) -> str:
    """Return the message of a URI whose scheme is unknown, or whose client is not installed."""
    scheme = uri.partition("://")[0]
    if scheme in OTHER_NAMES:
        return f"{uri}: write {OTHER_NAMES[scheme]}://... for {scheme}://, which needs no client"
    if isinstance(error, ImportError):
        package = CLIENTS.get(scheme)
        remedy = f"pip install {package}" if package else first_line(error)
        return f"{uri}: the client of {scheme}:// is not installed; {remedy}"
    return f"{uri}: {first_line(error)}; use a local path, s3://, gs://, az:// or hf://"


def _explain(request: Callable[..., Any], scheme: str) -> Callable[..., Any]:
    """Return a method whose errors are OSError."""

    @functools.wraps(request)
    def explained(*arguments: Any, **options: Any) -> Any:
        try:
            return request(*arguments, **options)
        except (OSError, NotImplementedError):
            raise
        except Exception as error:  # of the client's own kinds, such as those of httpx
            where = arguments[0] if arguments and isinstance(arguments[0], str) else ""
            raise StoreError(
                f"{scheme}://{where}: {type(error).__name__} ({first_line(error)}) to"
                f" {request.__name__}; check the name, the network and access to it"
            ) from error

    explained.raises_os_errors = True  # type: ignore[attr-defined]
    return explained
