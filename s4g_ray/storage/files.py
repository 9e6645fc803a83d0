"""Read, write, list, move and remove files: local paths, object stores, other URIs of fsspec.

Objects are written whole. A published folder is its files plus `_MANIFEST.json`, which is written
last (manifest.py); readers ignore a folder without one.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.util
import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from s4g_ray.errors import InputError, RunError, StoreError, WriteError, first_line
from s4g_ray.storage.s3_settings import is_object_store

MANIFEST = "_MANIFEST.json"
LEASE = "_OWNER.json"  # of the process that writes a folder: ownership/lease.py
PACKAGE_SCHEME = "package://"
# packages of fsspec's clients, by scheme
CLIENTS = {"hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp", "sftp": "paramiko"}
OTHER_NAMES = {"gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "s3n": "s3"}
REQUESTS = (
    *("ls", "info", "isfile", "isdir", "find", "cat_file", "cat_ranges", "open"),
    *("pipe_file", "put_file", "cp_file", "rm", "rm_file"),
)


def is_local(uri: str) -> bool:
    """Return whether a URI is a path on this machine."""
    return "://" not in uri


def join(uri: str, *parts: str) -> str:
    """Join parts to a folder's URI; an absolute path or a URI replaces all before it."""
    for part in parts:
        uri = part if part.startswith("/") or "://" in part else f"{uri.rstrip('/')}/{part}"
    return uri


def absolute(uri: str) -> str:
    """Make a local path (or file:// URI) absolute, because workers run in other folders.

    Returns URIs of object stores unchanged. Raises InputError for an empty path and for s3://
    without a bucket: both come from unset variables.
    """
    uri = uri.removeprefix("file://")
    if not uri:
        raise InputError(f"{uri!r} names no path; is a variable unset?")
    if re.fullmatch(r"(s3a?|gs|az)://*", uri):
        raise InputError(f"{uri!r} names no bucket; is a variable unset?")
    if not is_local(uri):
        return uri
    return str(Path(uri).expanduser().absolute())


def resolve_package(uri: str) -> str:
    """Return the path of a file that an installed Python package ships: `package://PACKAGE/FILE`.

    Returns other URIs unchanged. Raises InputError when the package or the file does not exist.
    """
    if not uri.startswith(PACKAGE_SCHEME):
        return uri
    package, _, name = uri.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):  # a missing parent package; an invalid module name
        spec = None
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or []:
        path = Path(folder) / name
        if path.is_file():
            return str(path)
    raise InputError(f"{uri}: no installed Python package {package!r} ships {name!r}")


def filesystem_of(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI, and the path there.

    A local path is used literally, also when it holds characters such as `*`, `[` or `#`.
    """
    if is_local(uri):
        return fsspec.filesystem("file"), uri
    if is_object_store(uri):
        from s4g_ray.storage.store_filesystem import store_filesystem  # takes 0.2 s to import

        scheme, _, path = uri.partition("://")
        return store_filesystem(scheme), path.rstrip("/")
    return _open_by_fsspec(uri)


def _open_by_fsspec(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI, and the path there. Makes no request.

    Its methods raise OSError alone: other errors of a client become StoreError. Raises InputError
    for a scheme that fsspec does not know, and where the scheme's client is not installed.
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
        except (OSError, NotImplementedError, TypeError, AttributeError, NameError):
            raise  # the last three are mistakes in code
        except Exception as error:  # of the client's own kinds, such as those of httpx
            where = arguments[0] if arguments and isinstance(arguments[0], str) else ""
            raise StoreError(
                f"{scheme}://{where}: {type(error).__name__} ({first_line(error)}) to"
                f" {request.__name__}; check the name, the network and access to it"
            ) from error

    explained.raises_os_errors = True  # type: ignore[attr-defined]
    return explained


def exists(uri: str) -> bool:
    """Return whether a file or folder exists."""
    filesystem, path = filesystem_of(uri)
    filesystem.invalidate_cache()  # other processes publish too
    return bool(filesystem.exists(path))


def list_names(uri: str) -> list[str]:
    """Return the sorted names of the entries of a folder; none when the folder does not exist."""
    filesystem, path = filesystem_of(uri)
    filesystem.invalidate_cache()
    try:
        paths = [entry.rstrip("/") for entry in filesystem.ls(path, detail=False)]
    except FileNotFoundError:
        return []
    # an object store may hold an empty object with the folder's own name: leave it out
    folder = path.rstrip("/")
    return sorted(entry.rsplit("/", 1)[-1] for entry in paths if entry != folder)


def list_content(uri: str) -> list[str]:
    """Return the names in a folder without what writing leaves beside: temporary files, a lease."""
    return [
        name for name in list_names(uri) if name != LEASE and not re.fullmatch(r"\..*\.tmp", name)
    ]


def remove(uri: str) -> None:
    """Remove a file, or a folder and everything in it. Does nothing when it does not exist.

    Removes the manifest of a published folder first, so that no reader takes a half-removed folder
    for a whole one. Raises WriteError when it cannot be removed.
    """
    filesystem, path = filesystem_of(uri)
    try:
        if filesystem.isfile(f"{path}/{MANIFEST}"):
            filesystem.rm_file(f"{path}/{MANIFEST}")
        if is_object_store(uri) or filesystem.exists(path):
            filesystem.rm(path, recursive=True)
    except OSError as error:
        raise WriteError(
            f"cannot remove {uri}: {_reason(uri, error)}; give write access"
        ) from error


def move(source: str, target: str) -> None:
    """Move a file, or a folder and everything in it. Does nothing when it does not exist.

    A local path moves at once. Elsewhere the objects are copied, each by the store itself, the
    manifest last, and the originals are removed then: an interrupted move is completed by
    repeating it. Raises WriteError when an object cannot be copied or removed.
    """
    try:
        if is_local(source):
            _move_local(Path(source), Path(target))
            return
        filesystem, path = filesystem_of(source)
        target_path = filesystem_of(target)[1]
        filesystem.invalidate_cache()
        for name in _manifest_last(filesystem.find(path)):
            filesystem.cp_file(name, f"{target_path}{name.removeprefix(path)}")
    except OSError as error:
        raise _move_error(source, target, error) from error
    remove(source)


def _move_local(source: Path, target: Path) -> None:
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # another disk: a folder below the run's may be a link
        found = [str(path) for path in source.rglob("*") if path.is_file()]
        for name in _manifest_last(found if source.is_dir() else [str(source)]):
            _write_whole(f"{target}{name.removeprefix(str(source))}", Path(name).read_bytes())
        remove(str(source))


def _manifest_last(paths: list[str]) -> list[str]:
    """Return paths of files, those of manifests at the end."""
    found = [path for path in paths if not path.endswith("/")]
    return sorted(found, key=lambda path: path.endswith(f"/{MANIFEST}"))


def _move_error(source: str, target: str, error: OSError) -> WriteError:
    return WriteError(
        f"cannot move {source} to {target}: {_reason(source, error)}; make room, or give write"
        " access, and repeat the command"
    )


def read_bytes(uri: str, offset: int | None = None, length: int | None = None) -> bytes:
    """Read a whole object, or `length` bytes from `offset`.

    Raises OSError (FileNotFoundError when the object does not exist), and EOFError when the range
    ends past the end of the object.
    """
    return check_length(read_available(uri, offset or 0, length), uri, offset, length)


def read_available(uri: str, start: int, length: int | None) -> bytes:
    """Read a range, or less where the object ends before `length` bytes. Raises OSError.

    Reads to the end of the object when length is None.
    """
    if not is_local(uri):
        filesystem, path = filesystem_of(uri)
        end = None if length is None else start + length
        return bytes(filesystem.cat_file(path, start=start, end=end))
    with Path(uri).open("rb") as file:
        num_left = os.fstat(file.fileno()).st_size - start
        file.seek(start)
        if length is None:
            return file.read()
        # read() allocates the memory that it is asked for: a wrong length must not reach it
        return file.read(max(0, min(length, num_left)))


def check_length(data: bytes, uri: str, offset: int | None, length: int | None) -> bytes:
    """Return the data of a range. Raises EOFError when it is not `length` bytes long."""
    if length is not None and len(data) != length:
        raise EOFError(
            f"{uri}: {length} bytes wanted from offset {offset or 0}, but {len(data)} found"
        )
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object: a reader sees the old one or the new one, never a part.

    Raises WriteError when there is no space or no permission.
    """
    try:
        _write_whole(uri, data)
    except OSError as error:
        raise _write_error(uri, data, error) from error


def _write_error(uri: str, data: bytes, error: OSError) -> WriteError:
    return WriteError(
        f"cannot write {uri} ({len(data)} bytes): {_reason(uri, error)}; published files stay"
        " readable; make room, or give write access"
    )


def _reason(uri: str, error: OSError) -> str:
    """Return the reason of an error, without the URI that it repeats."""
    return (error.strerror or str(error) or type(error).__name__).removeprefix(f"{uri}: ")


def _write_whole(uri: str, data: bytes) -> None:
    if is_local(uri):
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    else:
        filesystem, path = filesystem_of(uri)
        filesystem.pipe_file(path, data)


def append_bytes(path: str, data: bytes) -> None:
    """Append to a local file. A writer that dies may leave a part of the data.

    Raises WriteError as write_bytes does.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab") as file:
            file.write(data)
    except OSError as error:
        raise _write_error(path, data, error) from error


def write_json(uri: str, value: Any) -> None:
    """Write a JSON document as a whole object. Raises ValueError for NaN and infinities."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_bytes(uri, f"{text}\n".encode())


def read_json(uri: str) -> Any:
    """Read a JSON document. Raises FileNotFoundError, and RunError when it is not JSON."""
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{uri} is not valid JSON ({error}); it was cut short or altered") from error


def fingerprint(*chunks: bytes) -> str:
    """Return the sha256 of byte strings, in hex."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
